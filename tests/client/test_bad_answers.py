"""Servers that answer requests with errors, once or always: they cost themselves, not the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_lightning.client import ClientConfig, timeouts
from petals_lightning.client.timeouts import MAX_QUEUE_TIME, ServiceTimer
from petals_lightning.errors import RemoteRequestError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.running_server import RunningServer
from tests.helpers.families import ALL, NUM_BLOCKS
from tests.helpers.tampering import BATCH, OPTIONS, chosen, load_classifier

pytestmark = [pytest.mark.ours("servers are told what to answer"), pytest.mark.slow]

ERRORS: dict[str, Exception] = {
    "a sick GPU": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "bad request": Refusal(ErrorCode.BAD_REQUEST, "your tensors are wrong"),
    "adapter lost": Refusal(ErrorCode.ADAPTER_LOST, "this adapter is not registered here any more"),
    "graph lost": Refusal(ErrorCode.GRAPH_LOST, "the kept graph is gone"),
}


def fails(server: RunningServer, method: str, error: Exception, times: float = float("inf")) -> list[float]:
    """From now on `span.forward` or `span.backward` raises an error, so many times; when it did is in the list."""
    honest: Callable[..., Any] = getattr(server.span, method)
    calls: list[float] = []

    def instead(*args: Any, **kwargs: Any) -> Any:
        if len(calls) >= times:
            return honest(*args, **kwargs)
        calls.append(time.monotonic())
        raise error

    setattr(server.span, method, instead)
    return calls


def step(model: Any) -> float:
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return loss.item()


def local_loss(checkpoint: Any) -> float:
    torch.manual_seed(0)
    return step(LocalModelForSequenceClassification.from_pretrained(str(checkpoint), **OPTIONS))


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_server_that_always_answers_with_an_error_is_left(error, method, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load_classifier(swarm)
    calls = fails(chosen(model, swarm), method, error)
    expected = local_loss(checkpoint)
    for _ in range(6):
        assert step(model) == pytest.approx(expected, rel=1e-5)
    assert 0 < len(calls) <= remote_blocks(model).stats.retries <= 6


def test_a_request_that_all_servers_call_wrong_surfaces_in_their_words(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [ALL, ALL])
    model = load_classifier(swarm, ban_period=30.0)
    calls = [fails(server, "forward", ERRORS["bad request"], times=1) for server in swarm.servers]
    with pytest.raises(RemoteRequestError, match="says: your tensors are wrong"):
        step(model)
    assert [len(of_one) for of_one in calls] == [1, 1]
    step(model)  # neither server is in a ban of 30 s: they were right


def test_what_the_only_server_calls_wrong_surfaces_at_once(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, NUM_BLOCKS)])
    model = load_classifier(swarm, ban_period=30.0)
    calls = fails(swarm.servers[1], "forward", ERRORS["bad request"], times=2)  # handed over, and directly
    with pytest.raises(RemoteRequestError, match="says: your tensors are wrong"):
        step(model)
    assert len(calls) == 2
    step(model)


def test_an_accident_of_the_only_server_costs_a_try(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL])
    model = load_classifier(swarm)
    calls = fails(swarm.servers[0], "forward", ERRORS["a sick GPU"], times=1)
    assert step(model) == pytest.approx(local_loss(checkpoint), rel=1e-5)
    calls += fails(swarm.servers[0], "forward", ERRORS["a sick GPU"])
    with pytest.raises(RemoteRequestError, match="the server failed on this request"):
        step(model)


@pytest.mark.parametrize("error", [ERRORS["a sick GPU"], ERRORS["bad request"]], ids=["a sick GPU", "bad request"])
def test_a_generation_goes_on_elsewhere(error, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = swarm.load(AutoDistributedModelForCausalLM, client_config=ClientConfig(ban_period=30.0))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(BATCH["input_ids"][:1], **options)
    with model.inference_session(max_length=20) as session:
        begun = model.generate(BATCH["input_ids"][:1], **options | {"max_new_tokens": 3, "min_new_tokens": 3})
        sick = swarm.by_id[session.peers[0]]
        calls = fails(sick, "step", error)
        end = model.generate(begun[:, :0], **options | {"max_new_tokens": 3, "min_new_tokens": 3})
    assert torch.equal(torch.cat([begun, end], dim=1), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("value", [float("nan"), 1e30], ids=str)
@pytest.mark.parametrize("spans", [[ALL, ALL], [(0, 2), (2, NUM_BLOCKS), ALL]], ids=["one", "handed over"])
def test_a_step_that_cannot_be_right_is_made_elsewhere(spans, value, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), spans)
    model = swarm.load(AutoDistributedModelForCausalLM, client_config=ClientConfig(ban_period=30.0))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(BATCH["input_ids"][:1], **options)
    with model.inference_session(max_length=20) as session:
        begun = model.generate(BATCH["input_ids"][:1], **options | {"max_new_tokens": 3, "min_new_tokens": 3})
        sick = swarm.by_id[session.peers[-1]]
        honest = sick.span.step
        calls: list[int] = []

        def step(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(1)
            return torch.full_like(honest(*args, **kwargs), value)

        sick.span.step = step
        end = model.generate(begun[:, :0], **options | {"max_new_tokens": 3, "min_new_tokens": 3})
    assert torch.equal(torch.cat([begun, end], dim=1), expected)
    assert calls


def test_servers_without_room_do_not_keep_from_one_that_has(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL] * 6)
    model = load_classifier(swarm, max_retries=1, ban_period=30.0)
    asked: set[str] = set()

    def only_the_sixth(server: RunningServer) -> Callable[..., Any]:
        honest, peer = server.span.forward, server.node.peer_id.to_base58()

        def forward(*args: Any) -> Any:
            if peer not in asked and len(asked) < 5:
                asked.add(peer)
                raise Refusal(ErrorCode.OVERLOADED, "no room")
            return honest(*args)

        return forward

    for server in swarm.servers:
        server.span.forward = only_the_sixth(server)
    assert step(model) == pytest.approx(local_loss(checkpoint), rel=1e-5)
    assert len(asked) == remote_blocks(model).stats.retries == 5


def test_a_queue_that_never_moves_is_waited_for_no_longer_than_is_said(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load_classifier(
        swarm, request_timeout=1.0, min_request_timeout=0.5, heartbeat_period=0.2, hedge_factor=None
    )
    liar = chosen(model, swarm)
    honest = liar.span.forward

    def never(*args: Any) -> Any:
        time.sleep(20)
        return honest(*args)

    liar.span.forward = never  # type: ignore
    liar.resources.compute.ahead = lambda key: 1
    began = time.monotonic()
    assert step(model) == pytest.approx(local_loss(checkpoint), rel=1e-5)
    assert time.monotonic() - began > 1.0  # it was not given up at once: honest queues take their time


def test_a_queue_that_never_moves_costs_one_step(tiny_checkpoint, start_swarm, monkeypatch):
    monkeypatch.setattr(timeouts, "STALLED_QUEUE_TIMEOUT", 1.0)
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = load_classifier(swarm, heartbeat_period=0.2)
    liar = chosen(model, swarm)
    asked: list[int] = []

    def never(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        time.sleep(8)
        raise AssertionError("nobody waits for this")

    liar.span.forward_with_graph = never
    liar.resources.compute.ahead = lambda key: 1
    for _ in range(5):
        assert step(model) == pytest.approx(local_loss(checkpoint), rel=1e-5)
    assert len(asked) == remote_blocks(model).stats.hedges == 1


def test_the_clock_of_a_request(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = ServiceTimer()
    for seconds in (10.0, 20.0, 30.0):
        now = seconds
        clock.queue(5)
    assert (clock.seconds, clock.stalled) == (0.0, 20.0)
    clock.queue(4)
    assert (clock.stalled, clock.late, clock.overdue(5.0, 30.0)) == (0.0, 0.0, None)
    now = 34.0
    assert (clock.seconds, clock.overdue(5.0, 30.0)) == (4.0, None)
    now = 36.0
    assert "after 6 s of work" in str(clock.overdue(5.0, 30.0))
    now = 66.0
    clock.queue(4)
    assert "for 36 s without coming nearer" in str(clock.overdue(5.0, 30.0))
    now, ahead = 30.0, 1000
    clock.restart()
    while clock.overdue(5.0, 30.0) is None:
        now, ahead = now + 10, ahead - 1
        clock.queue(ahead)
    assert now == 30.0 + MAX_QUEUE_TIME * 30.0 + 10.0
    assert clock.lost == 0.0, "a queue that moves is not held against the server"
    now += 16.0
    clock.queue(ahead)
    assert (clock.seconds, clock.lost) == (0.0, 16.0)
