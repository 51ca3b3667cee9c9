"""Servers of a chain hand over to each other: results are those of local Hugging Face, whatever happens to servers."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.protocol.messages import CHUNK_BYTES, Message, Method
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.running_server import RunningServer
from tests.helpers.families import HIDDEN, VOCAB
from tests.helpers.parity import assert_same_gradients, pair
from tests.helpers.requests import segment_sizes
from tests.helpers.sessions import random_prompts
from tools.testing.swarms import InProcessSwarm
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

THREE = [(0, 1), (1, 3), (3, 4)]
IDS = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
GENERATION = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False, "eos_token_id": None, "use_cache": True}


@pytest.fixture(autouse=True)
def nothing_is_left_to_collect() -> Iterator[None]:
    """What hivemind's tasks of a killed daemon raised must not be told in the middle of something else."""
    yield
    gc.collect()


def load_pair(checkpoint, swarm, mode: str | None = "deep_ptune", **config):
    classes = AutoDistributedModelForCausalLM, LocalModelForCausalLM
    if "swarm_token" not in config:
        config |= {"heartbeat_period": 0.25, "heartbeat_timeout": 1.0, "ban_period": 60.0}
    return pair(*classes, checkpoint, swarm, mode, client_config=ClientConfig(**config))


def assert_trains_as_local(remote, local, between: Callable[[], None] = lambda: None) -> None:
    losses = []
    for model in (remote, local):
        model.zero_grad()
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        if model is remote:
            between()
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


def assert_generates_as_local(remote, local) -> None:
    inputs = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    got, expected = (
        remote.generate(**inputs, **GENERATION),
        local.generate(**inputs, **GENERATION | {"use_cache": False}),
    )
    assert torch.equal(got, expected)
    assert len(expected.unique()) > 3, "the test is blind: the model repeats itself"


def in_use(remote, swarm: InProcessSwarm) -> list[RunningServer]:
    return [swarm.by_id[leg.peer_id] for leg in remote_blocks(remote).route(IDS.numel())]


def signal_daemon(server: RunningServer, number: signal.Signals) -> None:
    process = server.node.daemon.process
    process.send_signal(number)
    if number is signal.SIGKILL:
        process.wait(10)
    while number is signal.SIGSTOP and psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.001)  # on a busy machine a stopped process's threads go on for a moment, and would answer


def strike(server: RunningServer, method: str, number: signal.Signals, struck_in: list[str]) -> None:
    """The server falls silent while it computes the next `method`: its daemon is struck, so nobody hears it."""
    honest = getattr(server.span, method)

    def struck(*args, **kwargs):
        setattr(server.span, method, honest)
        signal_daemon(server, number)
        struck_in.append(method)
        return honest(*args, **kwargs)

    setattr(server.span, method, struck)


@pytest.mark.ours("of the others, none can hand over")
@pytest.mark.parametrize(
    ("spans", "sizes"),
    [([(0, 1), (3, 4), (1, 3)], [2, 1]), ([(1, 2), (0, 1), (2, 4)], [1, 2])],
    ids=["ours in front", "ours behind"],
)
def test_ours_hand_over_where_a_server_in_the_chain_cannot(spans, sizes, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    remote, local = load_pair(checkpoint, start_swarm(checkpoint, spans, servers="mixed"))  # the second one is Petals'
    assert segment_sizes(remote(input_ids=IDS, labels=IDS).loss) == sizes
    assert_trains_as_local(remote, local)
    assert_generates_as_local(remote, local)
    assert remote_blocks(remote).stats.handovers == 1 + 2 + 7
    assert remote_blocks(remote).stats.retries == 0


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_server_lost_in_the_middle_changes_nothing(fault, victim, tiny_checkpoint, start_swarm, monkeypatch):
    # On a busy machine the route would change by itself, and who is not used cannot be missed.
    monkeypatch.setattr("petals_lightning.client.router._REROUTE_GAIN", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [*THREE, *[THREE[victim]] * 3])
    remote, local = load_pair(checkpoint, swarm, hedge_factor=None)  # or a second server would answer before that
    stats, lost = remote_blocks(remote).stats, []
    struck_in: list[Any] = []
    assert_trains_as_local(remote, local)
    try:
        for phase in ("forward", "backward", "step"):
            lost.append(in_use(remote, swarm)[victim])
            act = partial(strike, lost[-1], phase, fault, struck_in)
            if phase == "backward":
                assert_trains_as_local(remote, local, between=act)
            else:
                act()
                check = assert_trains_as_local if phase == "forward" else assert_generates_as_local
                check(remote, local)
            assert struck_in[-1] == phase
            assert lost[-1] not in in_use(remote, swarm)
            handovers = stats.handovers
            assert_trains_as_local(remote, local)
            assert stats.handovers == handovers + 2, "those who are left go on handing over"
    finally:
        if fault is signal.SIGSTOP:
            for server in lost:
                signal_daemon(server, signal.SIGCONT)
        else:  # leaving without a daemon takes its time
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda server: server.stop(timeout=0.1), lost))
            swarm.servers = [server for server in swarm.servers if server not in lost]


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_late_server_in_the_chain_is_not_waited_for(method, tiny_checkpoint, start_swarm, monkeypatch):
    # On a busy machine the route would change by itself, and who is not used cannot be late.
    monkeypatch.setattr("petals_lightning.client.router._REROUTE_GAIN", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [*THREE, (1, 3)])
    remote, local = load_pair(checkpoint, swarm)
    assert_trains_as_local(remote, local)
    late, stats = in_use(remote, swarm)[1], remote_blocks(remote).stats
    honest, released = getattr(late.span, method), threading.Event()

    def wait(*args):
        assert released.wait(60)
        return honest(*args)

    setattr(late.span, method, wait)
    try:
        assert_trains_as_local(remote, local)
    finally:
        released.set()
    assert stats.hedges >= 1
    assert stats.retries == 0


@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_training_and_generation_equal_local_hugging_face(mode, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("qwen3")
    swarm = start_swarm(checkpoint, THREE)
    remote, local = load_pair(checkpoint, swarm, mode)
    with torch.no_grad():
        got, expected = remote(input_ids=IDS).logits, local(input_ids=IDS).logits
    assert relative_error(got, expected[:, -got.shape[1] :]) < 1e-5
    stats = remote_blocks(remote).stats
    assert stats.handovers == 1
    if mode is not None:
        for _ in range(2):
            assert_trains_as_local(remote, local)
        assert stats.handovers == 5
        before = stats.handovers
        assert_generates_as_local(remote, local)
        assert stats.handovers == before + 7, "all tokens but the first, whose step opens the session"
    assert stats.retries == 0


def count_sent(remote, counts: Counter[str]) -> None:
    """From now on counts the messages that the client sends, by method; asking for a sign of life is none."""
    connections: list[Any] = list(remote_blocks(remote)._swarm.servers._connections.values())
    for connection in connections:

        async def send(call_id: int, message: Message, original=connection._writer.send) -> int:
            if message.method is not Method.PING:
                counts[message.method.value] += 1
            return await original(call_id, message)

        connection._writer.send = send


def test_the_client_sends_as_many_messages_as_to_one_server(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, THREE)
    remote, local = load_pair(checkpoint, swarm)
    layers = remote_blocks(remote)
    sent: Counter[str] = Counter()
    with layers.inference_session(max_length=20) as session:
        session.step(torch.randn(1, 3, HIDDEN))
        count_sent(remote, sent)
        for _ in range(10):
            session.step(torch.randn(1, 1, HIDDEN))
        assert sent == {"step": 10}
    assert_trains_as_local(remote, local)
    sent.clear()
    assert_trains_as_local(remote, local)
    assert sent == {"forward": 1, "backward": 1}, "prompts have not changed, so they do not travel again"


def test_a_chain_of_one_and_the_option_turn_it_off(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, THREE)
    for config in ({"server_to_server": False}, {"audit_rate": 0.01}):
        remote, local = load_pair(checkpoint, swarm, **config)
        assert_trains_as_local(remote, local)
        assert_generates_as_local(remote, local)
        assert remote_blocks(remote).stats.handovers == 0
    remote, local = load_pair(checkpoint, start_swarm(checkpoint, [(0, 4)], prefix="one"))
    assert remote_blocks(remote).stats.handovers == 0


def test_a_server_that_cannot_reach_the_next_costs_nothing_but_the_direct_way(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, THREE)
    remote, local = load_pair(checkpoint, swarm)
    middle = swarm.servers[1].resources
    links, middle.links = middle.links, None
    assert_generates_as_local(remote, local)
    assert_trains_as_local(remote, local)
    stats = remote_blocks(remote).stats
    assert stats.handovers == 0
    assert stats.retries == 0, "that it does not hand over is no failure"
    middle.links = links
    remote_blocks(remote)._swarm.router.handover._avoided.clear()  # its time is over
    assert_trains_as_local(remote, local)
    assert stats.handovers == 2


def test_servers_of_a_private_swarm_hand_over_without_rules_of_their_own(tiny_checkpoint, tmp_path, start_swarm):
    """They are on nobody's list and prove no token to each other: the client that is let in vouches for its request."""
    checkpoint, token = tiny_checkpoint("llama"), "a token of some length"
    swarm = start_swarm(checkpoint, THREE, rules=AccessRules(token=token))
    remote, local = load_pair(checkpoint, swarm, swarm_token=token)
    client = remote_blocks(remote)._swarm.node.peer_id.to_base58()
    for server in swarm.servers:
        server.resources.rules = AccessRules(allowed_peers=frozenset([client]), token=token)
    servers = remote_blocks(remote)._swarm.servers
    for peer in list(servers._connections):  # streams that were opened under the old rules
        servers.node.loop.call_soon_threadsafe(servers._connections.pop(peer).close)
    assert_trains_as_local(remote, local)
    assert_generates_as_local(remote, local)
    assert remote_blocks(remote).stats.handovers == 2 + 7


def test_an_old_envelope_sent_again_changes_no_gradient(tiny_checkpoint, start_swarm):
    """The server in front puts other activations under the call whose graph the client will go back through."""
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, THREE)
    remote, local = load_pair(checkpoint, swarm)
    links = swarm.servers[0].resources.links
    honest, envelopes, refusals = links.send, [], []

    async def send(peer: str, message: Message) -> None:
        envelopes.append((peer, message))
        await honest(peer, message)

    async def send_again() -> None:
        for peer, message in list(envelopes):
            lie = {name: tensor * 3 if name == "hidden" else tensor for name, tensor in message.tensors.items()}
            with pytest.raises(ConnectionError) as refusal:
                await honest(peer, replace(message, tensors=lie))
            refusals.append(str(refusal.value))

    links.send = send
    assert_trains_as_local(remote, local, between=lambda: swarm.servers[0].node.run(send_again()))
    assert refusals
    assert all("a permit is good once" in words for words in refusals)
    assert remote_blocks(remote).stats.handovers == 2


@pytest.mark.parametrize("rules", [None, AccessRules(token="a token of sixteen")], ids=["open", "private"])
def test_a_server_hands_over_nothing_that_the_next_one_does_not_take(rules, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)], rules=rules)
    taking = swarm.servers[1].resources
    taking.limits = replace(taking.limits, max_message_bytes=4 * CHUNK_BYTES)
    taking.info["max_message_bytes"] = 4 * CHUNK_BYTES
    remote, local = load_pair(checkpoint, swarm, swarm_token=rules.token if rules else None)
    assert_trains_as_local(remote, local)
    stats, links = remote_blocks(remote).stats, swarm.servers[0].resources.links
    ((peer, opening),) = links._links.items()
    large = Message(Method.HANDOVER, {}, {"hidden": torch.zeros(5 * CHUNK_BYTES // 4)})
    with pytest.raises(ConnectionError, match=r"a message of 1310720 bytes, it takes up to 524288"):
        swarm.servers[0].node.run(links.send(peer, large))
    assert stats.handovers == 2
    assert_trains_as_local(remote, local)
    assert stats.handovers == 4
    assert links._links[peer] is opening
    assert opening.result().is_open


def test_graphs_that_are_gone_are_computed_again_and_then_kept_here(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, THREE, limits=ServerLimits(graph_lifetime=0.0))
    remote, local = load_pair(checkpoint, swarm)
    stats = remote_blocks(remote).stats
    assert_trains_as_local(remote, local)
    assert stats.handovers == 1, "the forward; its graphs had expired"
    assert_trains_as_local(remote, local)
    assert stats.handovers == 1, "where graphs do not last, inputs are kept here"


@pytest.mark.parametrize("number", range(len(THREE)))
def test_a_stream_that_ends_between_forward_and_backward_counts_as_a_retry(
    number, tiny_checkpoint, start_swarm, monkeypatch
):
    monkeypatch.setattr("petals_lightning.client.router._REROUTE_GAIN", 1.0)  # as above
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [*THREE, *THREE])
    remote, local = load_pair(checkpoint, swarm)
    servers, stats = remote_blocks(remote)._swarm.servers, remote_blocks(remote).stats

    def end_stream() -> None:
        assert stats.handovers
        server = in_use(remote, swarm)[number]
        connection = servers._connections[server.node.peer_id.to_base58()]
        for session in list(server.streams.values()):
            server.node.loop.call_soon_threadsafe(session._writer.close)
        while connection.is_open:
            time.sleep(0.01)

    assert_trains_as_local(remote, local, between=end_stream)
    assert stats.retries == 1


def test_a_loss_can_be_gone_back_through_twice(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    remote, local = load_pair(checkpoint, start_swarm(checkpoint, THREE))
    for model in (remote, local):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(remote, local, 1e-5)
    assert_trains_as_local(remote, local)
    assert remote_blocks(remote).stats.handovers == 2 + 2


def test_a_wrong_answer_in_the_chain_is_found_in_the_direct_way(tiny_checkpoint, start_swarm, caplog, monkeypatch):
    monkeypatch.setattr("petals_lightning.client.router._REROUTE_GAIN", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [*THREE, (1, 3)])
    remote, local = load_pair(checkpoint, swarm)
    broken = in_use(remote, swarm)[1]
    honest = broken.span.forward

    def forward(*args):
        hidden, prefix = honest(*args)
        return hidden * float("nan"), prefix

    broken.span.forward = forward
    assert_trains_as_local(remote, local)
    assert broken not in in_use(remote, swarm)
    assert broken.node.peer_id.to_base58() in caplog.text
    assert all(server.node.peer_id.to_base58() not in caplog.text for server in swarm.servers if server is not broken)


def test_going_back_and_reordering_reach_every_server(tiny_checkpoint, start_swarm):
    """What a lost server is rebuilt from has come home late, and was rolled back and reordered meanwhile."""
    checkpoint = tiny_checkpoint("gemma3")
    swarm = start_swarm(checkpoint, [*THREE, (1, 3)])
    remote, _ = load_pair(checkpoint, swarm, None)
    layers, prompts, hidden = remote_blocks(remote), random_prompts(4), torch.randn(2, 10, HIDDEN)
    order = torch.tensor([1, 0])
    with layers.inference_session(max_length=12, **prompts) as session:
        session.step(hidden[:, :3])
        session.step(hidden[:, 3:5])
        session.step(torch.randn(2, 2, HIDDEN))
        session.position = 5
        session.step(hidden[:, 5:6])
        session.reorder(order)
        session.step(hidden[:, 6:7])
        assert layers.stats.handovers == 4
        lost = swarm.by_id[session.peers[1]]
        lost.stop(timeout=0.1)
        swarm.servers.remove(lost)
        outputs = [session.step(hidden[:, at : at + 1]) for at in range(7, 10)]
        assert layers.stats.handovers >= 5
    past = torch.cat([hidden[order][:, :6], hidden[:, 6:]], dim=1)
    expected, _ = layers.run(past, **prompts)
    assert relative_error(torch.cat(outputs, dim=1), expected[:, 7:]) < 1e-4


def test_the_option_of_a_run_reaches_the_client():
    from petals_lightning.strategies import PrivateSwarm

    source = PrivateSwarm(["/ip4/127.0.0.1/tcp/1/p2p/Qm"], server_to_server=False)
    assert source.client_config == ClientConfig(server_to_server=False)
    with pytest.raises(ConfigurationError):
        PrivateSwarm([], server_to_server=False)
