"""What the client does otherwise on servers that offer only Petals' methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.client.petals import connection as petals_connection
from petals_lightning.client.petals import session as petals_session
from petals_lightning.client.petals.calls import MAX_BATCH_TOKENS, rolls_back
from petals_lightning.errors import CacheFullError, IncompatibleServerError, UnsupportedInputError
from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.server.access.limits import ServerLimits
from tests.helpers.families import HIDDEN
from tests.helpers.sessions import random_prompts
from tools.testing.tensors import relative_error


@pytest.fixture
def layers(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals")
    return remote_blocks(swarm.load(AutoDistributedModel))


@pytest.mark.slow
def test_large_requests_go_through_streams_and_in_parts(layers):
    """A gradient of prompts for every sample outgrows the request that asks for it."""
    hidden, prompts = torch.randn(16, 30, HIDDEN, requires_grad=True), random_prompts(4)
    expected, _ = layers.run(hidden, **prompts)
    (connection,) = layers._swarm.servers._connections.values()
    connection._calls.max_unary_bytes = 0
    out, _ = layers.run(hidden, **prompts)
    assert torch.equal(out, expected)
    gradients = []
    for result in (out, expected):
        gradients.append(torch.autograd.grad(result.square().sum(), hidden)[0])
    assert torch.equal(*gradients)


@pytest.mark.slow
def test_batches_are_cut_to_what_such_servers_take(layers, tiny_checkpoint, start_swarm, monkeypatch):
    """By the client that knows the route, and where a batch was cut for another server, at the last moment."""
    hidden = torch.randn(3, MAX_BATCH_TOKENS // 2, HIDDEN)
    (connection,) = layers._swarm.servers._connections.values()
    connection.round_trip = 0.001  # a server that is far is sent smaller pieces
    before = layers.stats.requests
    layers(hidden)
    assert layers.stats.requests - before == 2
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals", limits=ServerLimits(max_batch_tokens=32))
    monkeypatch.setattr(petals_connection, "MAX_BATCH_TOKENS", 32)
    small = remote_blocks(swarm.load(AutoDistributedModel))
    (connection,) = small._swarm.servers._connections.values()
    connection.info["max_batch_tokens"] = 4096
    results = []
    for blocks in (layers, small):
        torch.manual_seed(0)
        inputs, prompts = torch.randn(7, 10, HIDDEN, requires_grad=True), random_prompts(4)
        leaves = [inputs, prompts["prefix"].requires_grad_(), prompts["adapter"].deep.requires_grad_()]
        before = blocks.stats.requests
        out, _ = blocks.run(inputs, **prompts)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert blocks.stats.requests - before == 2
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.slow
def test_positions_that_do_not_count_on_are_refused(layers):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2] = False
    with layers.inference_session(max_length=8) as session:
        with pytest.raises(UnsupportedInputError, match="number the real tokens"):
            session.step(torch.randn(2, 6, HIDDEN), attention_mask=mask)
        with pytest.raises(UnsupportedInputError, match="number the real tokens"):
            session.step(torch.randn(2, 6, HIDDEN), position_ids=torch.arange(6).flip(0)[None])
        assert session.step(torch.randn(2, 6, HIDDEN)).shape == (2, 6, HIDDEN)


@pytest.mark.slow
def test_padding_that_a_sliding_window_counts_is_refused(tiny_checkpoint, start_swarm):
    """Up to the window's length it makes no difference, nor where it stands in front of all that is real."""
    swarm = start_swarm(tiny_checkpoint("gemma3"), [(0, 4)], servers="petals")  # its window is 5
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    hidden = torch.randn(1, 6, HIDDEN)
    inside, left = torch.tensor([[1, 0, 1, 1, 1, 1]]).bool(), torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    for mask in (inside, left):
        with layers.inference_session(max_length=6) as session:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = session.step(hidden[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
            real = mask[:, :5]
            assert relative_error(out[real], layers(hidden[:, :5][real][None])[0]) < 1e-4
            last: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, 5:]}
            if mask is inside:
                with pytest.raises(UnsupportedInputError, match="sliding window of 5 positions"):
                    session.step(hidden[:, 5:], **last)
            else:
                assert relative_error(session.step(hidden[:, 5:], **last), layers(hidden[mask][None])[:, -1:]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1024, 4])
def test_padding_that_appears_later_is_left_out(pieces, layers, monkeypatch):
    """As where samples of a batch end their turns at different times: what was real becomes padding behind them."""
    monkeypatch.setattr(petals_session, "MAX_BATCH_TOKENS", pieces)
    hidden, prompts = torch.randn(3, 9, HIDDEN), random_prompts(4)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 4] = False
    with layers.inference_session(max_length=9, **prompts) as session:
        session.step(hidden[:, :5])
        positions = mask.cumsum(1) - 1
        outputs = [
            session.step(
                hidden[:, at : at + 2], attention_mask=mask[:, : at + 2], position_ids=positions[:, at : at + 2]
            )
            for at in (5, 7)
        ]
    for sample in range(3):
        expected, _ = layers.run(hidden[sample, mask[sample]][None], **prompts)
        assert relative_error(torch.cat(outputs, dim=1)[sample], expected[0, -4:]) < 1e-4
    assert layers.stats.retries == 1, "the samples had one session there, and need one each"


@pytest.mark.slow
def test_samples_with_more_padding_than_a_step_begin_later(layers):
    """A long prompt goes in pieces, of which the first ones may be all padding to some samples."""
    hidden, prompts = torch.randn(3, 9, HIDDEN), random_prompts(4)
    padding = torch.tensor([0, 5, 7])
    mask = torch.arange(9)[None] >= padding[:, None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with layers.inference_session(max_length=9, **prompts) as session:
        pieces = [hidden[:, :4], hidden[:, 4:6], hidden[:, 6:]]
        ends = [4, 6, 9]
        out = torch.cat(
            [
                session.step(piece, attention_mask=mask[:, :end], position_ids=positions[:, end - piece.shape[1] : end])
                for piece, end in zip(pieces, ends, strict=True)
            ],
            dim=1,
        )
    for sample, amount in enumerate(padding.tolist()):
        expected, _ = layers.run(hidden[sample : sample + 1, amount:], **prompts)
        assert relative_error(out[sample, amount:], expected[0]) < 1e-4


@pytest.mark.slow
def test_a_session_that_fits_nowhere_is_refused(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals", limits=ServerLimits(cache_bytes=1 << 12))
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    with (
        layers.inference_session(max_length=4096) as session,
        pytest.raises(CacheFullError, match="no room for the keys and values"),
    ):
        session.step(torch.randn(1, 2, HIDDEN))


@pytest.mark.slow
def test_a_session_that_the_server_has_ended_begins_again(layers):
    hidden = torch.randn(2, 7, HIDDEN)
    expected = layers(hidden)
    with layers.inference_session(max_length=7) as session:
        first = session.step(hidden[:, :4])
        (connection,) = layers._swarm.servers._connections.values()
        for open_session in connection._sessions.values():
            open_session.close()  # as where the server has let it end for idleness
        rest = session.step(hidden[:, 4:])
    assert relative_error(torch.cat([first, rest], dim=1), expected) < 1e-4
    assert layers.stats.retries == 1


@pytest.mark.slow
def test_servers_that_cannot_go_back_are_given_the_past_again(layers):
    hidden, other = torch.randn(2, 5, HIDDEN), torch.randn(2, 2, HIDDEN)
    expected = layers(torch.cat([hidden[:, :3], other], dim=1))
    (connection,) = layers._swarm.servers._connections.values()
    connection._calls.can_roll_back = False
    with layers.inference_session(max_length=8) as session:
        session.step(hidden)
        session.position = 3
        assert relative_error(session.step(other), expected[:, 3:]) < 1e-4
    assert layers.stats.retries == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.2.0.post1", False), ("1.1.5", False), ("2.3.0.dev2", True), ("2.3.0", True), ("0.3.1", True), (None, False)],
)
def test_which_versions_can_go_back(version, expected):
    assert rolls_back(version) == expected


@pytest.mark.slow
def test_a_swarm_with_a_token_uses_no_server_that_cannot_prove_it(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], servers="petals")
    with pytest.raises(IncompatibleServerError, match="cannot prove that it knows the swarm's token"):
        swarm.load(AutoDistributedModel, client_config=ClientConfig(swarm_token="0123456789abcdef"))
