"""Inference sessions through real swarms: step by step gives what one forward gives, whatever happens to servers."""

from __future__ import annotations

import time

import pytest
import torch

from petals_lightning.errors import CacheFullError, UnsupportedInputError
from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.server.access.limits import ServerLimits
from tests.helpers.families import HIDDEN, TINY_CONFIGS
from tests.helpers.parity import P
from tests.helpers.sessions import GENERATING, assert_steps_equal_one_forward, random_prompts
from tools.testing.tensors import relative_error


def layers_of(swarm, **options):
    return remote_blocks(swarm.load(AutoDistributedModel, **options))


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS.keys() - GENERATING))
def test_steps_equal_one_forward_in_further_families(family, tiny_checkpoint, start_swarm):
    assert_steps_equal_one_forward(layers_of(start_swarm(tiny_checkpoint(family), [(0, 1), (1, 4)])))


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed", "split")
def test_going_back_reordering_and_keeping_few_outputs(tiny_checkpoint, start_swarm):
    layers = layers_of(start_swarm(tiny_checkpoint("gemma3"), [(0, 2), (1, 4)]))
    prompts, hidden = random_prompts(4), torch.randn(3, 9, HIDDEN)
    with layers.inference_session(max_length=9, **prompts) as session:
        session.step(torch.randn(3, 8, HIDDEN))
        session.position = 0
        session.step(hidden[:, :5])
        session.step(torch.randn(3, 4, HIDDEN))
        session.position = 5
        order = torch.tensor([2, 0, 0])
        session.reorder(order)
        out = session.step(hidden[:, 5:], keep=2)
    expected, _ = layers.run(torch.cat([hidden[order, :5], hidden[:, 5:]], dim=1), **prompts)
    assert out.shape == (3, 2, HIDDEN)
    assert relative_error(out, expected[:, -2:]) < 1e-4


@pytest.mark.slow
def test_a_slice_of_blocks_has_sessions_of_its_own(tiny_checkpoint, start_swarm):
    layers = layers_of(start_swarm(tiny_checkpoint("llama"), [(0, 4)]))
    hidden, deep = torch.randn(2, 6, HIDDEN), torch.randn(2, P, HIDDEN)
    expected, _ = layers[1:3].run(hidden, prefix=torch.ones(P, HIDDEN), adapter=Adapter(1, 3, deep))
    whole = layers.inference_session(max_length=6)
    whole.step(hidden)
    with layers[1:3].inference_session(
        max_length=6, prefix=torch.ones(P, HIDDEN), adapter=Adapter(1, 3, deep)
    ) as session:
        outputs = [session.step(piece) for piece in hidden.split(2, dim=1)]
    assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-4
    whole.close()


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "prompted"), [(0, True), (1, False), (2, True)])
def test_a_lost_server_is_replaced_from_the_inputs_kept_here(victim, prompted, tiny_checkpoint, start_swarm):
    """Beams were reordered and positions rolled back before it is lost, and what takes its place is cut elsewhere."""
    swarm = start_swarm(tiny_checkpoint("qwen3"), [(0, 1), (1, 3), (3, 4), (0, 2), (2, 4)])
    layers = layers_of(swarm)
    prompts = random_prompts(4) if prompted else {}
    hidden, order = torch.randn(2, 12, HIDDEN), torch.tensor([1, 1])
    with layers.inference_session(max_length=20, **prompts) as session:
        session.step(hidden[:, :3])
        session.step(torch.randn(2, 2, HIDDEN))
        session.position = 3
        session.reorder(order)
        session.step(hidden[:, 3:5])
        session.reorder(order.flip(0))
        peer = session.peers[victim % len(session.peers)]
        lost = swarm.by_id[peer]
        lost.stop(timeout=0.1)
        outputs = [session.step(hidden[:, at : at + 1]) for at in range(5, 12)]
        assert peer not in session.peers
    expected, _ = layers.run(torch.cat([hidden[order][:, :3], hidden[order][:, 3:5], hidden[:, 5:]], dim=1), **prompts)
    swarm.servers.remove(lost)
    assert relative_error(torch.cat(outputs, dim=1)[:1], expected[:1, 5:]) < 1e-4
    assert layers.stats.retries >= 1


def cached(swarm):
    return [server.resources.caches.num_bytes for server in swarm.servers]


def wait_until_free(swarm) -> None:
    deadline = time.monotonic() + 5
    while any(cached(swarm)):
        assert time.monotonic() < deadline, cached(swarm)
        time.sleep(0.02)


@pytest.mark.slow
def test_memory_is_reserved_up_front_and_freed_on_closing(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1), (1, 4)])  # 2 key-value heads of 8
    layers = layers_of(swarm)
    session = layers.inference_session(max_length=100)
    session.step(torch.randn(3, 1, HIDDEN))
    of_a_block = 3 * 100 * 2 * (2 * 8) * 4
    assert cached(swarm) == [of_a_block, 3 * of_a_block]
    session.close()
    wait_until_free(swarm)
    with pytest.raises(UnsupportedInputError, match="closed"):
        session.step(torch.randn(3, 1, HIDDEN))
    layers.inference_session(max_length=100).step(torch.randn(3, 1, HIDDEN))
    layers.close()  # nobody ended it: it ends with its stream
    wait_until_free(swarm)


@pytest.mark.slow
def test_a_session_that_fits_nowhere_is_refused_with_the_reason(tiny_checkpoint, start_swarm):
    room = 4 * (4 * 50 * 2 * (2 * 8) * 4) // 3 + 1  # for 50 positions in 4 blocks; a quarter is kept for others
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4), (0, 4)], limits=ServerLimits(cache_bytes=room))
    layers = layers_of(swarm)
    with layers.inference_session(max_length=51) as session, pytest.raises(CacheFullError, match="1 × 51 positions"):
        session.step(torch.randn(1, 1, HIDDEN))
    sessions = [layers.inference_session(max_length=50) for _ in range(2)]
    for session in sessions:
        session.step(torch.randn(1, 1, HIDDEN))  # the second one goes where there is room
    assert {session.peers[0] for session in sessions} == {server.node.peer_id.to_base58() for server in swarm.servers}
    with layers.inference_session(max_length=10) as session, pytest.raises(CacheFullError, match="cache-memory"):
        session.step(torch.randn(1, 1, HIDDEN))
    sessions[0].close()
    with layers.inference_session(max_length=10) as session:
        session.step(torch.randn(1, 1, HIDDEN))
    assert layers(torch.randn(1, 2, HIDDEN)).shape == (1, 2, HIDDEN), "servers without room go on serving others"


@pytest.mark.slow
def test_an_idle_session_expires_and_is_built_anew_when_used(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], limits=ServerLimits(cache_lifetime=0.2))
    layers, hidden = layers_of(swarm), torch.randn(1, 6, HIDDEN)
    expected = layers(hidden)
    with layers.inference_session(max_length=6) as session:
        session.step(hidden[:, :4])
        time.sleep(0.3)
        swarm.servers[0].resources.caches.expire()
        assert cached(swarm) == [0]
        assert relative_error(session.step(hidden[:, 4:]), expected[:, 4:]) < 1e-4


@pytest.mark.slow
@pytest.mark.ours("they say how many tokens they take at once")
def test_long_inputs_are_sent_in_pieces_that_servers_take(tiny_checkpoint, start_swarm):
    limits = ServerLimits(max_batch_tokens=12)
    layers = layers_of(start_swarm(tiny_checkpoint("gpt2"), [(0, 2), (2, 4)], limits=limits))
    hidden, prompts = torch.randn(2, 17, HIDDEN), random_prompts(4)
    expected = torch.cat([layers.run(row[None, :9], **prompts)[0] for row in hidden])
    with layers.inference_session(max_length=17, **prompts) as session:
        assert relative_error(session.step(hidden)[:, :9], expected) < 1e-4
        session.position = 0
        assert session.step(hidden, keep=5).shape == (2, 5, HIDDEN)


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (torch.randn(2, 9, HIDDEN), "max_length=10"),
        (torch.randn(1, 1, HIDDEN), "batch 2, this step has 1"),
        (torch.randn(2, HIDDEN), r"\[B, n, H\]"),
    ],
)
def test_steps_that_do_not_fit_are_refused_here(hidden, words, tiny_checkpoint, start_swarm):
    layers = layers_of(start_swarm(tiny_checkpoint("llama"), [(0, 4)]))
    with layers.inference_session(max_length=10) as session:
        session.step(torch.randn(2, 3, HIDDEN))
        sent = layers.stats.bytes_sent
        with pytest.raises(UnsupportedInputError, match=words):
            session.step(hidden)
        with pytest.raises(UnsupportedInputError, match="go back to 0…3"):
            session.position = 4
        assert layers.stats.bytes_sent == sent
