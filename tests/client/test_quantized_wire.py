"""Activations and gradients in blockwise 8 bits: half the bytes of 16 bits, results within their rounding."""

from __future__ import annotations

import logging

import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import (
    AutoDistributedModel,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForSequenceClassification
from tests.helpers.families import ALL, HIDDEN
from tests.helpers.parity import P, assert_same_gradients, pair, right_padded_batch
from tests.helpers.sessions import random_prompts
from tests.helpers.tampering import chosen, tamper
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

CLASSIFIERS = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
TWO = [(0, 2), (2, 4)]


def load_pair(checkpoint, swarm, wire_dtype: str = "int8_blockwise", **config):
    client_config = ClientConfig(wire_dtype=wire_dtype, **config)
    return pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3, client_config=client_config)


def step(model, batch) -> float:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item()


def gradient_error(remote, local) -> float:
    """The largest relative error of the gradients of prompts and head."""
    got, wanted = dict(remote.named_parameters()), dict(local.named_parameters())
    trained = [name for name, parameter in wanted.items() if parameter.requires_grad]
    return max(relative_error(got[name].grad, wanted[name].grad) for name in trained)


@pytest.mark.parametrize("server_to_server", [True, False])
def test_a_step_costs_half_the_bytes_and_stays_within_rounding(server_to_server, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, TWO)
    batch = right_padded_batch(batch=32, length=40)
    moved, errors = {}, {}
    for wire_dtype in ("bfloat16", "int8_blockwise"):
        remote, local = load_pair(checkpoint, swarm, wire_dtype, server_to_server=server_to_server)
        stats = remote_blocks(remote).stats
        before = stats.bytes_sent + stats.bytes_received  # what servers say about themselves
        assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-2)
        errors[wire_dtype] = gradient_error(remote, local)
        assert (stats.retries, stats.handovers > 0) == (0, server_to_server)
        moved[wire_dtype] = stats.bytes_sent + stats.bytes_received - before
    assert 1e-4 < errors["int8_blockwise"] < 3e-2  # the test is blind if nothing was rounded
    assert errors["int8_blockwise"] < 10 * errors["bfloat16"]
    scales = 4 / HIDDEN  # a block of 64 is wider than this model
    assert moved["int8_blockwise"] < (0.5 + scales / 2 + 0.05) * moved["bfloat16"]


def test_twenty_training_steps_learn_as_much_as_locally(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    losses = []
    for model in load_pair(checkpoint, start_swarm(checkpoint, TWO)):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, trace = torch.optim.AdamW(trained, lr=1e-2), []
        for number in range(20):
            trace.append(step(model, right_padded_batch(number % 2)))
            optimizer.step()
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[1][-1] < 0.98 * losses[1][1], "the test is blind: nothing was learnt"


@pytest.mark.parametrize("unable", [[0, 1], [1]], ids=["both", "the second"])
def test_a_server_that_does_not_announce_it_is_not_sent_8_bits(unable, tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, TWO)
    quantised = []
    for number in unable:
        server = swarm.servers[number]
        del server.resources.info["wire_dtypes"]
        received = server.span.forward
        server.span.forward = lambda inputs, *cached, run=received: (
            quantised.append(is_quantised(inputs.hidden)) or run(inputs, *cached)
        )
    remote, local = load_pair(checkpoint, swarm)
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-2)
    assert quantised
    assert not any(quantised)
    if unable == [0, 1]:
        assert_same_gradients(remote, local, 1e-5)
    else:
        assert 1e-4 < gradient_error(remote, local) < 3e-2


def is_quantised(hidden: torch.Tensor) -> bool:
    """Whether each row consists of whole multiples of a 127th of its largest value."""
    codes = hidden / (hidden.abs().amax(-1, keepdim=True) / 127)
    return bool(((codes - codes.round()).abs() < 1e-3).all())


def test_servers_of_petals_methods_stand_in_the_same_chain(tiny_checkpoint, start_swarm):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    remote, local = load_pair(checkpoint, start_swarm(checkpoint, TWO, servers="mixed"))
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-2)
    assert 1e-4 < gradient_error(remote, local) < 3e-2


@pytest.mark.parametrize("server_to_server", [True, False])
def test_sessions_give_what_a_forward_gives(server_to_server, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), TWO)
    exact = swarm.load(AutoDistributedModel, shared_peer=True).layers
    config = ClientConfig(wire_dtype="int8_blockwise", server_to_server=server_to_server)
    layers = swarm.load(AutoDistributedModel, shared_peer=True, client_config=config).layers
    hidden, prompts = torch.randn(2, 11, HIDDEN), random_prompts(4)
    expected, _ = exact.run(hidden, **prompts)
    with layers.inference_session(max_length=11, **prompts) as session:
        steps = torch.cat([session.step(piece) for piece in hidden.split([4, 1, 1, 3, 1, 1], dim=1)], dim=1)
    assert 1e-4 < relative_error(steps, expected) < 2e-2


def test_audits_allow_for_the_rounding_and_for_no_more(tiny_checkpoint, start_swarm, caplog):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [ALL, *TWO, *TWO])
    remote, local = load_pair(checkpoint, swarm, audit_rate=1.0, ban_period=60.0)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            step(remote, right_padded_batch(seed))
    assert remote_blocks(remote).stats.audits >= 10
    assert "differ" not in caplog.text
    assert "lies" not in caplog.text
    tamper(chosen(remote, swarm), lambda hidden: hidden + 0.5 * hidden.std() * torch.randn_like(hidden))
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-2)
    assert "lies" in caplog.text


def test_an_answer_that_is_not_finite_is_found(tiny_checkpoint, start_swarm, caplog):
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    swarm = start_swarm(checkpoint, [ALL, ALL])
    remote, local = load_pair(checkpoint, swarm)
    tamper(chosen(remote, swarm), lambda hidden: hidden * torch.where(hidden == hidden.max(), float("inf"), 1.0))
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-2)
    assert "NaN or infinity" in caplog.text
    assert prompts_of(remote).deep.grad.isfinite().all()


def test_an_unknown_wire_dtype_is_refused():
    with pytest.raises(ConfigurationError, match="int8_blockwise"):
        ClientConfig(wire_dtype="int8")


def test_prompts_travel_in_16_bits(tiny_checkpoint, start_swarm):
    """Their error is the same for all samples of a batch, so it would not average out."""
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, TWO)
    seen = []
    for server in swarm.servers:
        received = server.span.forward
        server.span.forward = lambda inputs, *cached, run=received: seen.append(inputs) or run(inputs, *cached)
    remote, _ = load_pair(checkpoint, swarm)
    step(remote, right_padded_batch())
    assert relative_error(torch.cat([inputs.adapter.deep for inputs in seen]), prompts_of(remote).deep.detach()) < 2**-8
    assert all(inputs.prefix.shape == (P, HIDDEN) and not is_quantised(inputs.prefix) for inputs in seen)
    assert all(is_quantised(inputs.hidden) for inputs in seen)
