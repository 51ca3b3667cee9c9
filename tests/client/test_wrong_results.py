"""Servers whose answers are wrong: found, left, named; the step's result is that of the honest ones."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.client.audit import stratified
from petals_lightning.client.verify import disagreement
from petals_lightning.errors import RetriesExhaustedError
from petals_lightning.models import AutoDistributedModelForSequenceClassification, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.server.server import Server
from tests.families import NUM_BLOCKS
from tests.swarms import InProcessSwarm, peer_with_the_graph

ALL = (0, NUM_BLOCKS)
BATCH = {"input_ids": torch.arange(1, 25).view(4, 6), "labels": torch.tensor([0, 1, 1, 0])}


def load(swarm: InProcessSwarm, **config):
    torch.manual_seed(0)
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 2, "num_labels": 2}
    return swarm.load(
        AutoDistributedModelForSequenceClassification, client_config=ClientConfig(ban_period=0.2, **config), **options
    )


def tamper(server: Server, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From now on the server answers `change(hidden)` in forwards, and gradients that follow from it."""
    honest = server.span.forward

    def forward(inputs, *cached):
        hidden, prefix = honest(inputs, *cached)
        return change(hidden), prefix

    server.span.forward = forward


def chosen(model, swarm: InProcessSwarm) -> Server:
    """The server that the model uses now."""
    peer = remote_blocks(model).route(BATCH["input_ids"].numel())[0].peer_id
    return next(server for server in swarm.servers if server.node.peer_id.to_base58() == peer)


def assert_as_local(model, checkpoint) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 2, "num_labels": 2}
    local = LocalModelForSequenceClassification.from_pretrained(str(checkpoint), **options)
    losses = []
    for one in (model, local):
        one.zero_grad()
        losses.append(one(**BATCH).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    got, wanted = prompts_of(model).deep.grad, prompts_of(local).deep.grad
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hidden: hidden * float("nan"), "NaN or infinity"),
        (lambda hidden: hidden.sign() * 1e38, "values of up to 1.0e+38, whose squares overflow"),
        (lambda hidden: torch.where(hidden == hidden.max(), 1e20, hidden), "values of up to 1.0e+20"),
        (lambda hidden: hidden[:-1], "asked for float32"),
    ],
    ids=["NaN", "absurd values that cancel out", "one absurd value", "another shape"],
)
def test_an_answer_that_cannot_be_right_is_the_servers_failure(change, words, tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load(swarm)
    broken = chosen(model, swarm)
    tamper(broken, change)
    assert_as_local(model, checkpoint)
    assert remote_blocks(model).stats.retries >= 1
    assert words in caplog.text
    assert broken.node.peer_id.to_base58() in caplog.text


def test_gradients_that_are_not_finite_are_refused_and_overflowing_ones_excused(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load(swarm)
    loss = model(**BATCH).loss
    peer = peer_with_the_graph(loss)
    broken = next(server for server in swarm.servers if server.node.peer_id.to_base58() == peer)
    honest = broken.span.backward
    broken.span.backward = lambda *args: {name: grad * float("inf") for name, grad in honest(*args).items()}
    loss.backward()
    assert prompts_of(model).deep.grad.isfinite().all()
    retries = remote_blocks(model).stats.retries
    assert retries == 1
    (model(**BATCH).loss * float("inf")).backward()  # a loss scale that was too large is nobody's fault
    assert remote_blocks(model).stats.retries == retries


def test_an_audit_tells_absurd_values_from_honest_ones():
    honest, lie = torch.ones(2, 3), torch.full((2, 3), 1e30)
    assert disagreement({"hidden": lie}, {"hidden": honest}) == float("inf")
    assert disagreement({"hidden": honest}, {"hidden": honest}) == 0.0


def test_two_servers_that_say_nan_are_believed_and_one_alone_is_named(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [ALL, ALL])
    model = load(swarm)
    for server in swarm.servers:
        tamper(server, lambda hidden: hidden * float("nan"))
    with torch.no_grad():
        assert model(**BATCH).loss.isnan()
        swarm.servers.pop().stop(timeout=1)
        with pytest.raises(RetriesExhaustedError, match=r"twice, and nobody else holds blocks 0:4.*bfloat16"):
            model(**BATCH)


def test_a_liar_is_caught_by_audits(tiny_checkpoint, start_swarm, caplog, monkeypatch):
    # On a busy machine the route would change by itself, and who is not used cannot be caught.
    monkeypatch.setattr("petals_lightning.client.view._WORTH_A_CHANGE", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    model = load(swarm, audit_rate=0.1)
    liar = chosen(model, swarm)

    def add_noise(hidden: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(hidden)
        return hidden + 0.01 * hidden.norm() * noise / noise.norm()

    tamper(liar, add_noise)
    name = liar.node.peer_id.to_base58()
    used = 0
    while name not in caplog.text:
        used += 1
        assert used <= 50, "audit_rate=0.1 must find it within 50 micro-batches"
        with torch.no_grad():
            model(**BATCH)
    print(f"the liar was caught in micro-batch {used}")
    assert "lies" in caplog.text
    time.sleep(0.6)  # its ban does not end with that of others
    assert chosen(model, swarm) is not liar
    assert_as_local(model, checkpoint)


def test_a_liar_in_backward_is_caught_and_the_gradient_is_right(tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    model = load(swarm, audit_rate=1.0)
    liar = chosen(model, swarm)
    honest = liar.span.backward
    liar.span.backward = lambda *args: {name: grad * 1.01 for name, grad in honest(*args).items()}
    assert_as_local(model, checkpoint)
    assert liar.node.peer_id.to_base58() in caplog.text


def test_honest_servers_pass_every_audit(tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, NUM_BLOCKS), (0, 2), (2, NUM_BLOCKS)])
    model = load(swarm, audit_rate=1.0)
    with caplog.at_level(logging.WARNING):
        assert_as_local(model, checkpoint)
    assert remote_blocks(model).stats.audits >= 2
    assert "audit" not in caplog.text
    assert remote_blocks(model).stats.retries == 0


def test_a_late_request_is_tried_elsewhere_too(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load(swarm)
    model(**BATCH).loss.backward()  # speeds are measured
    calls = itertools.count()
    for server in swarm.servers:  # whichever is asked first is late

        def forward(inputs, *cached, honest=server.span.forward):
            if next(calls) == 0:
                time.sleep(6)
            return honest(inputs, *cached)

        server.span.forward = forward
    began = time.monotonic()
    assert_as_local(model, checkpoint)
    assert time.monotonic() - began < 5.5
    assert remote_blocks(model).stats.hedges == 1
    assert remote_blocks(model).stats.retries == 0


def test_disagreement_is_relative_and_infinite_where_shapes_differ():
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.05])
    assert disagreement({"hidden": one}, {"hidden": other}) == pytest.approx(0.05 / other.norm().item(), rel=1e-4)
    assert disagreement({"hidden": one}, {"hidden": one[:1]}) == float("inf")
    assert disagreement({"hidden": one * torch.nan}, {"hidden": other}) == float("inf")
    assert disagreement({"hidden": one * torch.nan}, {"hidden": other * torch.nan}) == 0


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7, 1.0])
def test_audits_are_drawn_at_their_rate_and_never_far_apart(rate):
    draws = list(itertools.islice(stratified(rate, random.Random(0)), 3000))
    assert sum(draws) / len(draws) == pytest.approx(rate, rel=0.25)
    apart = [len(list(group)) for drawn, group in itertools.groupby(draws) if not drawn]
    assert max(apart, default=0) <= 2 / rate
