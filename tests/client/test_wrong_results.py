"""Servers whose answers are wrong: found, left, named; the step's result is that of the honest ones."""

from __future__ import annotations

import itertools
import logging
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_lightning.client.audit import stratified
from petals_lightning.client.segments import Leg, Segment
from petals_lightning.client.validation import disagreement
from petals_lightning.errors import RetriesExhaustedError
from petals_lightning.hf import Checkpoint
from petals_lightning.models import (
    AutoDistributedModel,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.judge import LocalJudge
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.server.server import Server
from tests.helpers.families import ALL, HIDDEN, NUM_BLOCKS
from tests.helpers.requests import peer_with_the_graph
from tests.helpers.tampering import BATCH, OPTIONS, chosen, load_classifier, tamper
from tools.testing.swarms import InProcessSwarm
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow


def assert_as_local(model, checkpoint) -> None:
    torch.manual_seed(0)
    local = LocalModelForSequenceClassification.from_pretrained(str(checkpoint), **OPTIONS)
    losses = []
    for one in (model, local):
        one.zero_grad()
        losses.append(one(**BATCH).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    got, wanted = prompts_of(model).deep.grad, prompts_of(local).deep.grad
    assert relative_error(got, wanted) < 1e-5


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
    model = load_classifier(swarm)
    broken = chosen(model, swarm)
    tamper(broken, change)
    assert_as_local(model, checkpoint)
    assert remote_blocks(model).stats.retries >= 1
    assert words in caplog.text
    assert broken.node.peer_id.to_base58() in caplog.text


def test_gradients_that_are_not_finite_are_refused_and_overflowing_ones_excused(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load_classifier(swarm)
    loss = model(**BATCH).loss
    broken = swarm.by_id[peer_with_the_graph(loss)]
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
    model = load_classifier(swarm)
    for server in swarm.servers:
        tamper(server, lambda hidden: hidden * float("nan"))
    with torch.no_grad():
        assert model(**BATCH).loss.isnan()
        swarm.servers.pop().stop(timeout=1)
        with pytest.raises(RetriesExhaustedError, match=r"twice, and no other server holds blocks 0:4.*bfloat16"):
            model(**BATCH)


def test_a_liar_is_caught_by_audits(tiny_checkpoint, start_swarm, caplog, monkeypatch):
    # On a busy machine the route would change by itself, and who is not used cannot be caught.
    monkeypatch.setattr("petals_lightning.client.router._REROUTE_GAIN", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    model = load_classifier(swarm, audit_rate=0.1)
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
    model = load_classifier(swarm, audit_rate=1.0)
    liar = chosen(model, swarm)
    honest = liar.span.backward
    liar.span.backward = lambda *args: {name: grad * 1.01 for name, grad in honest(*args).items()}
    assert_as_local(model, checkpoint)
    assert liar.node.peer_id.to_base58() in caplog.text


def collude(swarm: InProcessSwarm) -> tuple[set[str], str]:
    """Makes the first two of three servers lie alike. Returns their ids, and the honest one's."""
    *liars, honest = swarm.servers
    for server in liars:
        tamper(server, lambda hidden: hidden * 1.1)
    return {server.node.peer_id.to_base58() for server in liars}, honest.node.peer_id.to_base58()


def bans_of(model) -> dict[str, Any]:
    return remote_blocks(model)._swarm.servers._bans


def test_liars_that_agree_do_not_outvote_what_this_machine_computes(tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    liars, honest = collude(swarm)
    model = load_classifier(swarm, audit_rate=1.0)
    steps = 0
    while not all(liar in bans_of(model) and bans_of(model)[liar].is_proven for liar in liars):
        steps += 1
        assert steps <= 50, "in half of its audits a liar is compared with the honest server"
        with torch.no_grad():
            model(**BATCH)
        assert honest not in bans_of(model)
    assert caplog.text.count("lies: its result is") == 2
    assert_as_local(model, checkpoint)


def test_trusted_servers_decide_from_the_first_step(tiny_checkpoint, start_swarm, tmp_path, caplog):
    checkpoint = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    liars, honest = collude(swarm)
    model = load_classifier(swarm, audit_rate=1.0, trusted_servers=(honest,))
    take_weights_away(checkpoint)
    for _ in range(5):
        assert_as_local(model, tiny_checkpoint("llama"))
    assert set(bans_of(model)) <= liars
    assert all(ban.is_proven for ban in bans_of(model).values())


def test_without_a_judge_nobody_is_called_a_liar(tiny_checkpoint, start_swarm, tmp_path, caplog):
    checkpoint = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    swarm = start_swarm(checkpoint, [ALL, ALL, ALL])
    liars, honest = collude(swarm)
    model = load_classifier(swarm, audit_rate=1.0)
    take_weights_away(checkpoint)
    for _ in range(50):
        with torch.no_grad():
            model(**BATCH)
        if honest in bans_of(model):
            break
    assert bans_of(model).keys() & liars
    assert not any(ban.is_proven for ban in bans_of(model).values())
    assert re.search(r"there is no judge \(.*model.safetensors.*\)\. Put the model .* trusted_servers", caplog.text)
    assert "lies" not in caplog.text


def take_weights_away(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()


def test_who_claims_to_be_fast_does_not_become_everybodys_auditor(tiny_checkpoint, start_swarm, monkeypatch):
    record = Server._record
    claims = iter([1e9, 1.0, 1.0, 1.0])
    monkeypatch.setattr(
        Server, "_record", lambda self, *args: replace(record(self, *args), tokens_per_second=next(claims))
    )
    swarm = start_swarm(tiny_checkpoint("llama"), [ALL, ALL, ALL, ALL])
    router = remote_blocks(load_classifier(swarm))._swarm.router
    fast, *others = (server.node.peer_id.to_base58() for server in swarm.servers)
    fastest = router.other_route(*ALL, tokens=1, avoid=[others[0]])
    assert fastest is not None
    assert fastest[0].peer_id == fast
    generator = random.Random(0)
    drawn = Counter(
        route[0].peer_id
        for _ in range(600)
        if (route := router.auditing_route(*ALL, avoid=others[0], generator=generator))
    )
    assert set(drawn) == {fast, *others[1:]}
    assert min(drawn.values()) > 150


@pytest.mark.parametrize("has_prompts", [True, False])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_judge_computes_what_an_honest_server_answers(has_prompts, family, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, [ALL])
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    start, end = 1, NUM_BLOCKS
    shapes = {"hidden": (2, 5, HIDDEN), "prefix": (3, HIDDEN), "deep": (end - start, 3, HIDDEN)}
    names = ["hidden", "prefix", "deep"] if has_prompts else ["hidden"]
    given = {name: torch.randn(shapes[name], requires_grad=True) for name in names}
    values = {name: tensor.detach() for name, tensor in given.items()}
    rows, prefix = torch.tensor([2, 9]), given.get("prefix")
    adapters = [Adapter(start, end, each["deep"]) if has_prompts else None for each in (given, values)]
    outputs = layers[start:end].run(
        given["hidden"], rows=rows, want_prefix=has_prompts, prefix=prefix, adapter=adapters[0]
    )
    answer = dict(zip(names[:2], outputs, strict=False))
    segment = Segment([Leg(start, end, "")], values["hidden"], values.get("prefix"), rows)
    judge = LocalJudge(Checkpoint(str(checkpoint)))
    judged = judge(segment, adapters[1], None)
    assert judged.keys() == answer.keys()
    assert disagreement(judged, answer) < 1e-5
    grads = {name: torch.randn_like(output) for name, output in answer.items()}
    torch.autograd.backward(list(answer.values()), list(grads.values()))
    judged = judge(segment, adapters[1], (grads["hidden"], grads.get("prefix")))
    assert judged.keys() == given.keys()
    assert disagreement(judged, {name: tensor.grad for name, tensor in given.items() if tensor.grad is not None}) < 1e-5


def test_honest_servers_pass_every_audit(tiny_checkpoint, start_swarm, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, NUM_BLOCKS), (0, 2), (2, NUM_BLOCKS)])
    model = load_classifier(swarm, audit_rate=1.0)
    with caplog.at_level(logging.WARNING):
        assert_as_local(model, checkpoint)
    assert remote_blocks(model).stats.audits >= 2
    assert "audit" not in caplog.text
    assert remote_blocks(model).stats.retries == 0


def test_a_late_request_is_tried_elsewhere_too(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load_classifier(swarm)
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
