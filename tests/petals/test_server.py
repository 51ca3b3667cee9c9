"""Petals' methods of our servers: parity with local models, sessions, pushes, limits and rules."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hivemind.p2p import P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertUID
from transformers import AutoModel

from petals_lightning.hf.loading import quiet_transformers
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.protocol.petals.metadata import parse_error
from petals_lightning.protocol.petals.methods import ReachabilityProtocol
from petals_lightning.protocol.petals.steps import NextServer, PetalsStep
from petals_lightning.protocol.petals.tensors import FLOAT16
from petals_lightning.protocol.records import ServerState
from petals_lightning.protocol.uids import MODELS_KEY
from petals_lightning.server.access import AccessRules
from petals_lightning.server.limits import ServerLimits
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from tests.families import HIDDEN, NUM_BLOCKS
from tests.petals.calls import ROOM, PetalsCaller
from tests.sessions import relative_error
from tests.swarms import PREFIX, InProcessSwarm

B, S, P = 2, 7, 3
SPLIT = 2  # blocks of the first of two servers
LIMITS = ServerLimits(cache_bytes=1 << 20, max_batch_tokens=512, max_message_bytes=1 << 20, max_client_bytes=4 << 20)


def run_locally(checkpoint, hidden, start, end, prompts=None):
    """Blocks [start, end) of the plain model, prompts [n, B or 1, P, H] added before each."""
    with quiet_transformers():
        model = AutoModel.from_pretrained(checkpoint).eval()
    taken = []

    def before(number):
        def hook(module, args):
            states = hidden if number == start else args[0]
            if prompts is not None and start <= number < end:
                added = prompts[number - start]
                states = torch.cat([states[:, : added.shape[1]] + added, states[:, added.shape[1] :]], dim=1)
            return (states, *args[1:])

        return hook

    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(before(number))
        if number == end - 1:
            layer.register_forward_hook(lambda module, args, output: taken.append(output))
    model(inputs_embeds=hidden)
    return taken[0]


@pytest.fixture(scope="module")
def swarm(tiny_checkpoint):
    with InProcessSwarm(
        tiny_checkpoint("llama"), [(0, NUM_BLOCKS), (0, SPLIT), (SPLIT, NUM_BLOCKS)], limits=LIMITS
    ) as s:
        yield s


@pytest.fixture(scope="module")
def client(swarm):
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        yield node


def peer_id(server):
    return server.node.peer_id.to_base58()


@pytest.fixture
def callers(swarm, client):
    """One for each server: of all blocks, of the first and of the last ones."""
    yield [PetalsCaller(client, peer_id(server)) for server in swarm.servers]
    for server in swarm.servers:
        backend = server._backend

        async def settled(backend=backend):
            while backend.under_way or backend.accounts._accounts or backend.caches._caches:
                await asyncio.sleep(0.01)

        server.node.run(asyncio.wait_for(settled(), 10))
        assert backend.accounts.num_bytes == 0


def step(hidden, start=0, end=NUM_BLOCKS, **fields):
    return PetalsStep(PREFIX, start, end, hidden, **fields)


@pytest.mark.parametrize("samples", [None, 1, B], ids=["no_prompts", "shared_prompts", "prompts_per_sample"])
@pytest.mark.parametrize(("start", "end"), [(0, NUM_BLOCKS), (1, 3)])
def test_forward_and_backward_equal_the_local_model(samples, start, end, tiny_checkpoint, callers):
    caller, hidden = callers[0], torch.randn(B, S, HIDDEN, requires_grad=True)
    prompts = torch.randn(end - start, samples, P, HIDDEN) if samples is not None else None
    per_sample = prompts.expand(-1, B, -1, -1).clone().requires_grad_() if prompts is not None else None
    expected = run_locally(tiny_checkpoint("llama"), hidden, start, end, per_sample)
    grad = torch.randn_like(expected)
    leaves = [hidden] if prompts is None else [hidden, per_sample]
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    request = PetalsForward(PREFIX, start, end, hidden, prompts)
    assert relative_error(caller.forward(request), expected) < 1e-5
    backward = PetalsBackward(PREFIX, start, end, hidden, grad, prompts)
    streamed = read_response(caller.stream("rpc_backward_stream", backward.to_parts().to_stream()), max_bytes=ROOM)
    for grads in (caller.backward(backward), streamed):
        assert len(grads) == len(expected_grads)
        for got, reference in zip(grads, expected_grads, strict=True):
            assert got.shape == reference.shape
            assert relative_error(got, reference) < 1e-5


def test_compression_is_taken_and_given(callers):
    caller, hidden = callers[0], torch.randn(B, S, HIDDEN)
    exact = caller.forward(PetalsForward(PREFIX, 0, NUM_BLOCKS, hidden))
    request = PetalsForward(PREFIX, 0, NUM_BLOCKS, hidden, output_compression=[FLOAT16])
    response = caller.unary("rpc_forward", request.to_parts().to_request([FLOAT16]))
    assert response.tensors[0].compression == FLOAT16
    assert len(response.tensors[0].buffer) == 2 * hidden.numel()
    (got,) = read_response([response], max_bytes=ROOM)
    assert 0 < relative_error(got, exact) < 1e-2


def test_steps_equal_one_forward_whatever_is_rolled_back(tiny_checkpoint, callers):
    hidden = torch.randn(B, 9, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    session = callers[0].open_session()
    assert session.step(step(hidden[:, :0], max_length=12)).shape == (B, 0, HIDDEN)
    got = session.step(step(hidden[:, :4]))
    assert relative_error(got, expected[:, :4]) < 1e-5
    session.step(step(torch.randn(B, 5, HIDDEN), start_from_position=4))
    got = session.step(step(hidden[:, 4:6], start_from_position=4))
    assert relative_error(got, expected[:, 4:6]) < 1e-5
    session.step(step(torch.randn(B, 1, HIDDEN)))
    assert session.step(step(hidden[:, :0], start_from_position=3)).shape == (B, 0, HIDDEN)
    got = session.step(step(hidden[:, 3:9]))
    assert relative_error(got, expected[:, 3:9]) < 1e-5
    session.end()


def test_hypo_ids_choose_what_a_sample_goes_on_from(tiny_checkpoint, callers):
    hidden, more = torch.randn(3, 4, HIDDEN), torch.randn(3, 2, HIDDEN)
    chosen = torch.tensor([2, 0, 2])
    expected = run_locally(tiny_checkpoint("llama"), torch.cat([hidden[chosen], more], 1), 1, NUM_BLOCKS)
    session = callers[0].open_session()
    session.step(step(hidden, 1, max_length=6))
    got = session.step(step(more, 1, hypo_ids=chosen))
    assert relative_error(got, expected[:, 4:]) < 1e-5
    session.end()


def test_prompts_are_added_at_the_step_that_brings_them(tiny_checkpoint, callers):
    hidden, prompts = torch.randn(B, S, HIDDEN), torch.randn(NUM_BLOCKS, B, P, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS, prompts)
    session = callers[0].open_session()
    got = [session.step(step(hidden[:, :4], prompts=prompts, max_length=S)), session.step(step(hidden[:, 4:]))]
    assert relative_error(torch.cat(got, 1), expected) < 1e-5
    session.end()
    later = torch.cat([torch.zeros(NUM_BLOCKS, B, 4, HIDDEN), prompts[:, :1].expand(-1, B, -1, -1)], 2)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS, later)
    session = callers[0].open_session()
    got = [session.step(step(hidden[:, :4], max_length=S)), session.step(step(hidden[:, 4:], prompts=prompts[:, :1]))]
    assert relative_error(torch.cat(got, 1), expected) < 1e-5
    session.end()


def test_a_step_is_pushed_to_the_next_server_and_run_once(tiny_checkpoint, swarm, callers):
    hidden = torch.randn(B, 6, HIDDEN)
    middle = run_locally(tiny_checkpoint("llama"), hidden, 0, SPLIT)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    first, last = callers[1].open_session(), callers[2].open_session()
    hops = [NextServer(peer_id(swarm.servers[2]), "last", SPLIT, NUM_BLOCKS)]
    opening = {"max_length": 6, "step_id": "0", "start_from_position": 0}
    first.step(step(hidden[:, :3], 0, SPLIT, session_id="first", **opening))
    last.step(step(middle[:, :3], SPLIT, session_id="last", **opening))
    for position in range(3, 6):
        piece = slice(position, position + 1)
        fields = {"step_id": str(position), "start_from_position": position}
        got = first.step(step(hidden[:, piece], 0, SPLIT, session_id="first", next_servers=hops, **fields))
        pushed = last.receive()  # nothing was sent to it
        assert relative_error(pushed, expected[:, piece]) < 1e-5
        last.send(step(got, SPLIT, session_id="last", **fields))
    first.end()
    last.end()  # asserts that the copies were not answered


def test_a_push_that_does_not_fit_harms_no_session(tiny_checkpoint, callers):
    hidden = torch.randn(B, 6, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    session = callers[0].open_session()
    session.step(step(hidden[:, :3], max_length=6, session_id="mine", step_id="a"))
    for bad in (
        step(hidden[:, :2], start_from_position=0, session_id="mine", step_id="b", pushed=True),  # a roll-back
        step(hidden[:1, :1], start_from_position=3, session_id="mine", step_id="c", pushed=True),  # another batch
        step(hidden[:, :5], session_id="mine", step_id="d", pushed=True),  # too long
        step(hidden[:, :1], 1, 2, session_id="mine", step_id="e", pushed=True),  # other blocks
        step(hidden[:, :1], session_id="nobody", step_id="f", pushed=True),
    ):
        callers[0].unary("rpc_push", bad.to_parts().to_request())
    garbage = step(hidden[:, :1], session_id="mine", pushed=True).to_parts().to_request()
    garbage.tensors[0].size[0] = 77
    callers[0].unary("rpc_push", garbage)
    got = session.step(step(hidden[:, 3:], step_id="g", start_from_position=3))
    assert relative_error(got, expected[:, 3:]) < 1e-5
    session.end()


def failure(call) -> tuple[ErrorCode | None, str]:
    with pytest.raises(P2PHandlerError) as refused:
        call()
    assert "Traceback" not in str(refused.value)
    assert ".py" not in str(refused.value)
    return parse_error(str(refused.value))


def test_wrong_requests_are_told_why(callers):
    caller, hidden = callers[1], torch.randn(B, S, HIDDEN)
    good = PetalsForward(PREFIX, 0, SPLIT, hidden)

    def forward(**changes):
        return failure(lambda: caller.forward(replace(good, **changes)))

    def backward(grad, **changes):
        return failure(lambda: caller.backward(PetalsBackward(PREFIX, 0, SPLIT, hidden, grad, **changes)))

    cases = [
        (forward(end=3), ErrorCode.NOT_SERVED, "0:2"),
        (forward(prefix="other"), ErrorCode.NOT_SERVED, "of 'tiny'"),
        (forward(active_adapter="lora"), ErrorCode.NOT_SERVED, "no adapter"),
        (forward(hidden=torch.randn(B, S, 8)), ErrorCode.BAD_REQUEST, "hidden size 8"),
        (forward(hidden=torch.ones(B, S, HIDDEN, dtype=torch.int64)), ErrorCode.BAD_REQUEST, "int64"),
        (forward(hidden=torch.randn(B, 300, HIDDEN)), ErrorCode.BAD_REQUEST, "up to 512"),
        (forward(hidden=torch.randn(S, HIDDEN)), ErrorCode.BAD_REQUEST, r"[B, S, H]"),
        (forward(prompts=torch.randn(3, B, P, HIDDEN)), ErrorCode.BAD_REQUEST, "prompts"),
        (forward(prompts=torch.randn(2, B, S + 1, HIDDEN)), ErrorCode.BAD_REQUEST, "at most 7"),
        (forward(prompts=torch.randn(2, B + 1, P, HIDDEN)), ErrorCode.BAD_REQUEST, "2 or 1"),
        (forward(output_compression=[5]), ErrorCode.BAD_REQUEST, "output_compression"),
        (backward(torch.randn(B, S + 1, HIDDEN)), ErrorCode.BAD_REQUEST, "not like the inputs"),
        (failure(lambda: caller.unary("rpc_info", ExpertUID(uid=f"{PREFIX}.3"))), ErrorCode.NOT_SERVED, "0:2"),
        (failure(lambda: caller.unary("rpc_forward", ExpertRequest(uid="x"))), ErrorCode.BAD_REQUEST, ""),
    ]  # fmt: skip
    for (code, words), expected_code, expected_words in cases:
        assert code is expected_code, words
        assert expected_words in words
    assert caller.forward(good).shape == hidden.shape


OPENING = step(torch.ones(1, 1, HIDDEN), max_length=3)


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([step(torch.ones(1, 1, HIDDEN))], ErrorCode.BAD_REQUEST, "max_length"),
        ([step(torch.ones(1, 4, HIDDEN), max_length=3)], ErrorCode.BAD_REQUEST, "max_length 3"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=10**6)], ErrorCode.OVERLOADED, "no room for the keys and values"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=3, start_from_position=1)], ErrorCode.BAD_REQUEST, "0 positions"),
        ([OPENING, step(torch.ones(2, 1, HIDDEN))], ErrorCode.BAD_REQUEST, "batch"),
        ([OPENING, step(torch.ones(1, 1, HIDDEN), 1)], ErrorCode.BAD_REQUEST, "1:4"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=3, active_adapter="x")], ErrorCode.NOT_SERVED, "adapter"),
        ([step(torch.ones(10**6, 0, HIDDEN), max_length=0)], ErrorCode.BAD_REQUEST, "up to 512"),
    ],
)  # fmt: skip
def test_wrong_steps_end_their_session_with_a_reason(steps, code, words, callers):
    session = callers[0].open_session()
    *good, bad = steps
    for item in good:
        session.step(item)
    got_code, got_words = failure(lambda: session.step(bad))
    assert (got_code, words in got_words) == (code, True), got_words


def test_room_for_a_session_is_waited_for(callers):
    large = step(torch.ones(1, 1, HIDDEN), max_length=1200)  # two of it are over the budget
    first = callers[0].open_session()
    first.step(large)
    code, _ = failure(lambda: callers[0].open_session().step(large))
    assert code is ErrorCode.OVERLOADED
    second = callers[0].open_session()
    second.send(replace(large, alloc_timeout=20.0))
    first.end()
    assert second.receive().shape == (1, 1, HIDDEN)
    second.end()


def test_requests_over_the_limits_are_refused_before_they_are_read(swarm, client, callers):
    huge = PetalsForward(PREFIX, 0, SPLIT, torch.zeros(1, 10_000, HIDDEN)).to_parts().to_stream()
    code, words = failure(lambda: callers[1].stream("rpc_forward_stream", huge))
    assert code is ErrorCode.BAD_REQUEST
    assert "limit" in words

    async def claim(length: int) -> bytes:
        """What a peer is told that claims to send so much, and sends nothing."""
        name = "TransformerConnectionHandler.rpc_inference"
        _, reader, writer = await client.p2p.call_binary_stream_handler(swarm.servers[1].node.peer_id, name)
        writer.write(b"\0" + length.to_bytes(8, "big"))
        try:
            return await asyncio.wait_for(reader.readuntil(b"bytes"), 10)
        finally:
            writer.close()

    assert f"bad_request: a message of {2**60} bytes".encode() in client.run(claim(2**60))


def test_a_client_may_have_so_much_open_and_no_more(tiny_checkpoint, start_swarm):
    limits = ServerLimits(max_open_requests=3, max_client_bytes=64 << 10)
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1)], limits=limits)
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        caller = PetalsCaller(node, peer_id(swarm.servers[0]))
        sessions = [caller.open_session() for _ in range(3)]
        for session in sessions:
            session.step(step(torch.ones(1, 1, HIDDEN), 0, 1, max_length=4))
        code, words = failure(lambda: caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 1, HIDDEN))))
        assert (code, "requests open" in words) == (ErrorCode.OVERLOADED, True)
        for session in sessions:
            session.end()
        code, words = failure(lambda: caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 600, HIDDEN))))
        assert (code, "no room for" in words) == (ErrorCode.OVERLOADED, True)
        assert caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 1, HIDDEN))).shape == (1, 1, HIDDEN)


@pytest.mark.parametrize(
    "rules", [AccessRules(allowed_peers=frozenset()), AccessRules(token="x" * 20)], ids=["list", "token"]
)
def test_strangers_are_refused_every_method(rules, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1)], rules=rules)
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        server, hidden = swarm.servers[0], torch.ones(1, 2, HIDDEN)
        caller, computed = PetalsCaller(node, peer_id(server)), []
        server.span.forward = lambda inputs: computed.append(inputs)
        server.span.step = lambda *args, **kwargs: computed.append(args)
        forward, backward = PetalsForward(PREFIX, 0, 1, hidden), PetalsBackward(PREFIX, 0, 1, hidden, hidden)
        calls = [
            lambda: caller.unary("rpc_info", ExpertUID(uid=f"{PREFIX}.0")),
            lambda: caller.forward(forward),
            lambda: caller.backward(backward),
            lambda: caller.unary("rpc_push", step(hidden, 0, 1, session_id="x").to_parts().to_request()),
            lambda: caller.stream("rpc_forward_stream", forward.to_parts().to_stream()),
            lambda: caller.stream("rpc_backward_stream", backward.to_parts().to_stream()),
            lambda: caller.open_session().step(step(hidden, 0, 1, max_length=4)),
        ]
        for call in calls:
            assert failure(call)[0] is ErrorCode.NOT_ALLOWED
        assert computed == []
        assert not server._backend.accounts._accounts


def test_a_peer_is_told_whether_it_and_others_are_reached(swarm, client):
    def check(target) -> bool:
        async def call():
            stub = ReachabilityProtocol.get_stub(client.p2p, swarm.servers[0].node.peer_id)
            return await stub.rpc_check(
                dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=target.to_bytes())), timeout=20
            )

        return client.run(call()).available

    assert check(swarm.servers[0].node.peer_id)
    assert check(swarm.servers[1].node.peer_id)
    assert not check(client.peer_id)  # it answers no such question


def test_records_of_petals_only_servers_look_like_petals(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, 4)], petals_only=[1])
    node = swarm.servers[0].node
    ours, theirs = (
        next(iter(node.run(node.dht.get(f"{PREFIX}.{block}", latest=True)).value.values())).value for block in (0, 3)
    )
    assert "lightning" in ours[2]
    state, throughput, extra = theirs
    assert (state, throughput > 0) == (int(ServerState.ONLINE), True)
    assert (extra["start_block"], extra["end_block"], extra["torch_dtype"], extra["quant_type"]) == (
        2, 4, "float32", "none",
    )  # fmt: skip
    assert set(extra) <= {
        "start_block", "end_block", "public_name", "version", "network_rps", "forward_rps", "inference_rps", "adapters",
        "torch_dtype", "quant_type", "using_relay", "cache_tokens_left", "next_pings",
    }  # fmt: skip
    assert extra["cache_tokens_left"] > 10_000
    models = node.run(node.dht.get(MODELS_KEY, latest=True)).value
    assert models[PREFIX].value == {"num_blocks": NUM_BLOCKS, "repository": None}


def test_private_models_are_served_and_not_listed(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)], prefix="_secret")
    node = swarm.servers[0].node
    assert node.run(SwarmDirectory(node.dht).models()) == []
    caller = PetalsCaller(swarm.servers[0].node, peer_id(swarm.servers[0]))
    assert caller is not None
