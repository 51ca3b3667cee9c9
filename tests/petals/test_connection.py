"""The parity and generation suites, through servers that offer only Petals' methods and chains that alternate."""

from __future__ import annotations

import pytest
import torch

from petals_lightning.client import ClientConfig, petals_connection
from petals_lightning.client.petals_calls import rolls_back
from petals_lightning.client.petals_connection import MAX_BATCH_TOKENS
from petals_lightning.errors import IncompatibleServerError, NoCacheRoomError, UnsupportedInputError
from petals_lightning.models import AutoDistributedModel, AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.server.limits import ServerLimits
from tests.families import HIDDEN
from tests.models import test_generation as generation
from tests.models import test_parity as parity
from tests.sessions import random_prompts, relative_error

ONLY_PETALS, ALTERNATING = True, [1]  # in a chain of two or three, the second server
assistant = generation.assistant


@pytest.fixture
def start_kind(request, start_swarm):
    """`start_swarm` of a kind."""
    return lambda *args, **options: start_swarm(*args, petals_only=request.param, **options)


def kinds(*cases):
    """Parametrises a test by kind of swarm and, if a case has it, family: all of them with all would take minutes."""
    names = [f"{'only petals' if kind is True else 'alternating'}-{'-'.join(family)}" for kind, *family in cases]
    fixtures = ("start_kind", "family")[: len(cases[0])]
    return pytest.mark.parametrize(fixtures, cases, ids=names, indirect=["start_kind"])


@kinds(
    (ONLY_PETALS, "llama"),
    (ONLY_PETALS, "bloom"),
    (ONLY_PETALS, "mixtral"),
    (ALTERNATING, "llama"),
    (ALTERNATING, "falcon"),
)
def test_parity(family, tiny_checkpoint, start_kind):
    parity.test_every_family_equals_local_hugging_face(family, tiny_checkpoint, start_kind)


@kinds((ALTERNATING,))
def test_losses(tiny_checkpoint, start_kind):
    parity.test_twenty_training_steps_give_the_local_losses("deep_ptune", tiny_checkpoint, start_kind)


@kinds((ONLY_PETALS,))
def test_bfloat16(tiny_checkpoint, start_kind):
    parity.test_bfloat16_stays_within_its_rounding(tiny_checkpoint, start_kind)


@kinds((ALTERNATING,))
def test_slices(tiny_checkpoint, start_kind):
    parity.test_a_slice_of_remote_blocks_has_the_gradients_of_those_blocks(tiny_checkpoint, start_kind)


@kinds((ONLY_PETALS, "llama"), (ALTERNATING, "bloom"))
def test_tokens_and_steps(family, tiny_checkpoint, start_kind, assistant):
    generation.assert_tokens_and_steps(tiny_checkpoint(family), start_kind, assistant, hands_over=False)


@kinds((ONLY_PETALS, "bloom"), (ALTERNATING, "llama"))
def test_prompts_in_generation(family, tiny_checkpoint, start_kind, assistant):
    generation.test_prompts_act_as_in_training(family, tiny_checkpoint, start_kind, assistant)


@kinds((ALTERNATING,))
def test_a_conversation_can_go_back(tiny_checkpoint, start_kind):
    swarm = start_kind(tiny_checkpoint("llama"), [(0, 2), (2, 4)])
    generation.test_a_conversation_can_go_back((swarm.load(AutoDistributedModelForCausalLM), None, swarm))


@pytest.fixture
def layers(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], petals_only=True)
    return remote_blocks(swarm.load(AutoDistributedModel))


def test_large_requests_go_through_streams_and_in_parts(layers):
    """A gradient of prompts for every sample outgrows the request that asks for it."""
    hidden, prompts = torch.randn(16, 30, HIDDEN, requires_grad=True), random_prompts(4)
    expected, _ = layers.run(hidden, **prompts)
    (connection,) = layers._swarm.view._connections.values()
    connection._calls.max_unary_bytes = 0
    out, _ = layers.run(hidden, **prompts)
    assert torch.equal(out, expected)
    gradients = []
    for result in (out, expected):
        gradients.append(torch.autograd.grad(result.square().sum(), hidden)[0])
    assert torch.equal(*gradients)


def test_batches_are_cut_to_what_such_servers_take(layers, tiny_checkpoint, start_swarm, monkeypatch):
    """By the client that knows the route, and where a batch was cut for another server, at the last moment."""
    hidden = torch.randn(3, MAX_BATCH_TOKENS // 2, HIDDEN)
    before = layers.stats.requests
    layers(hidden)
    assert layers.stats.requests - before == 2
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], petals_only=True, limits=ServerLimits(max_batch_tokens=32))
    monkeypatch.setattr(petals_connection, "MAX_BATCH_TOKENS", 32)
    small = remote_blocks(swarm.load(AutoDistributedModel))
    (connection,) = small._swarm.view._connections.values()
    connection.info["max_batch_tokens"] = 4096
    results = []
    for blocks in (layers, small):
        torch.manual_seed(0)
        inputs, prompts = torch.randn(7, 10, HIDDEN, requires_grad=True), random_prompts(4)
        leaves = [inputs, *(tensor.requires_grad_() for tensor in prompts.values())]
        before = blocks.stats.requests
        out, _ = blocks.run(inputs, **prompts)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert blocks.stats.requests - before == 2
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-5


def test_padding_that_cannot_be_left_out_is_refused(layers):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2] = False
    with layers.inference_session(max_length=8) as session:
        with pytest.raises(UnsupportedInputError, match="padding inside"):
            session.step(torch.randn(2, 6, HIDDEN), attention_mask=mask)
        with pytest.raises(UnsupportedInputError, match="do not count on"):
            session.step(torch.randn(2, 6, HIDDEN), position_ids=torch.arange(6).flip(0)[None])
        assert session.step(torch.randn(2, 6, HIDDEN)).shape == (2, 6, HIDDEN)


def test_samples_with_more_padding_than_a_step_begin_later(layers):
    """A long prompt goes in pieces, of which the first ones may be all padding to some samples."""
    hidden, prompts = torch.randn(3, 9, HIDDEN), random_prompts(4)
    padding = torch.tensor([0, 5, 7])
    mask = torch.arange(9)[None] >= padding[:, None]
    with layers.inference_session(max_length=9, **prompts) as session:
        pieces = [hidden[:, :4], hidden[:, 4:6], hidden[:, 6:]]
        ends = [4, 6, 9]
        out = torch.cat(
            [session.step(piece, attention_mask=mask[:, :end]) for piece, end in zip(pieces, ends, strict=True)], dim=1
        )
    for sample, amount in enumerate(padding.tolist()):
        expected, _ = layers.run(hidden[sample : sample + 1, amount:], **prompts)
        assert relative_error(out[sample, amount:], expected[0]) < 1e-4


def test_a_session_that_fits_nowhere_is_refused(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], petals_only=True, limits=ServerLimits(cache_bytes=1 << 12))
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    with (
        layers.inference_session(max_length=4096) as session,
        pytest.raises(NoCacheRoomError, match="no room for the keys and values"),
    ):
        session.step(torch.randn(1, 2, HIDDEN))


def test_a_session_that_the_server_has_ended_begins_again(layers):
    hidden = torch.randn(2, 7, HIDDEN)
    expected = layers(hidden)
    with layers.inference_session(max_length=7) as session:
        first = session.step(hidden[:, :4])
        (connection,) = layers._swarm.view._connections.values()
        for open_session in connection._sessions.values():
            open_session.close()  # as where the server has let it end for idleness
        rest = session.step(hidden[:, 4:])
    assert relative_error(torch.cat([first, rest], dim=1), expected) < 1e-4
    assert layers.stats.retries == 1


def test_servers_that_cannot_go_back_are_given_the_past_again(layers):
    hidden, other = torch.randn(2, 5, HIDDEN), torch.randn(2, 2, HIDDEN)
    expected = layers(torch.cat([hidden[:, :3], other], dim=1))
    (connection,) = layers._swarm.view._connections.values()
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


def test_a_swarm_with_a_token_uses_no_server_that_cannot_prove_it(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], petals_only=True)
    with pytest.raises(IncompatibleServerError, match="cannot prove that it knows the swarm's token"):
        swarm.load(AutoDistributedModel, client_config=ClientConfig(swarm_token="0123456789abcdef"))
