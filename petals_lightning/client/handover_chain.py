"""A micro-batch through servers that hand it over to each other, forward and backward.

Only what enters the first server and what leaves the last one is seen here, so nothing can be mended in between: if
anything fails, the whole chain runs again in the direct way, from the first inputs.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N rows that are read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.deadlines import BACKWARD_COST, Patience, ServiceClock, patience
from petals_lightning.client.handover import SHOWN_DIRECTLY, Handover, Stage
from petals_lightning.client.hedging import race
from petals_lightning.client.legs import ChainGrads, ChainResult, Leg, MicroBatch
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import check_backward, check_forward, seconds_of
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import PeerFailure, WrongResult
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, grads_bytes, to_wire

T = TypeVar("T")

# Errors that concern the hand-over only; the same server may succeed when it is asked directly.


class HandoverChain:
    """All methods belong to the node's loop."""

    def __init__(self, view: SwarmView, stats: TransferStats):
        self._view, self._stats = view, stats

    async def plan(self, batch: MicroBatch, end: int) -> list[Leg]:
        """Legs through blocks [batch.start, end) whose servers may hand over; none: take the direct way."""
        if not self._view.handover.is_on:
            return []
        route = await self._view.route(batch.start, end, tokens=batch.tokens)
        if len(route) < 2:
            return []
        try:
            connections = [await self._view.connection(planned.peer_id) for planned in route]
        except PeerFailure:
            return []  # the direct way meets it too, and deals with it
        if not self._view.handover.allows(connections):
            return []
        nothing = batch.hidden.new_empty(0)
        legs = [
            Leg(planned.start, planned.end, nothing, None, None, planned.peer_id, connection)
            for planned, connection in zip(route, connections, strict=True)
        ]
        legs[0].hidden, legs[0].prefix, legs[-1].rows = batch.hidden, batch.prefix, batch.rows
        return legs

    def can_go_back(self, legs: Sequence[Leg]) -> bool:
        """Whether all servers kept their graphs, as far as they have said, and may hand over."""
        if not self._view.handover.allows([leg.connection for leg in legs]):
            return False
        if any(leg.graph is None for leg in legs):
            self._view.handover.avoid([leg.peer for leg in legs], "they have no room for graphs")
            return False
        return True

    async def run(
        self,
        batch: MicroBatch,
        legs: list[Leg],
        handed_over: Callable[[], Awaitable[T]],
        directly: Callable[[Collection[str]], Awaitable[T]],
        attempts: Attempts,
        *,
        cost: float = 1.0,
    ) -> T:
        """Tries hand-over first; falls back to direct requests; races both when a replaceable server is slow.

        Args:
            directly: takes peers to do without, if that is possible.
            cost: how long it should take, in forwards.

        Raises:
            SwarmError: of the direct way.
        """
        for leg in legs:
            leg.clock.hold()  # until its request is there

        def note(failure: PeerFailure) -> None:
            self._note(failure, legs, attempts)

        def second() -> _Way[T] | None:
            late = max(legs, key=lambda leg: leg.clock.lost)
            if self._view.other_route(late.start, late.end, tokens=batch.tokens, avoid=[late.peer]) is None:
                return None
            elapsed = late.clock.lost / cost
            self._view.paces.report_slow(late.peer, tokens=batch.tokens, blocks=late.end - late.start, elapsed=elapsed)
            return _Way(ServiceClock(), lambda: directly([late.peer]))

        hedges = [self._patience(batch, leg, cost).hedge for leg in legs]
        after = max((hedge for hedge in hedges if hedge is not None), default=None)
        first = _Way(_Clocks(legs), handed_over)
        try:
            winner, result = await race(first, lambda way: way.run(), after=after, second=second, on_failure=note)
        except PeerFailure as e:
            note(e)
            return await directly(())
        if winner is first:
            self._stats.handovers += 1
        else:
            self._stats.hedges += 1
            self._view.handover.avoid([leg.peer for leg in legs], "the direct way was quicker")
        return result

    async def forward(self, batch: MicroBatch, legs: list[Leg], want_prefix: bool) -> ChainResult:
        """Runs the legs of `plan`. Raises PeerFailure, of whichever server failed first."""
        hidden, prefix, entering = batch.hidden, batch.prefix, self._view.wire_dtype(legs[0].peer)
        requests = [
            ForwardRequest(
                start=leg.start,
                end=leg.end,
                hidden=to_wire(hidden, entering),
                prefix=to_wire(prefix, entering, prompts=True) if prefix is not None else None,
                rows=batch.rows,
                keep=batch.keep,
                input_grad=batch.input_grad or leg is not legs[0],
                want_prefix=prefix is not None and (want_prefix or leg is not legs[-1]),
                wire_dtype=self._view.wire_dtype(leg.peer),
            )
            for leg in legs
        ]
        if batch.prompts is not None:
            keys = await asyncio.gather(*(self._prompts_key(batch, leg) for leg in legs))
            for request, key in zip(requests, keys, strict=True):
                request.prompts_key = key
        stages = [
            self._stage(batch, leg, request.to_message(), 1.0, is_last=leg is legs[-1])
            for leg, request in zip(legs, requests, strict=True)
        ]
        travel = _Travel(self._view, [leg.peer for leg in legs], is_measured=batch.leads)
        for leg, stage in zip(legs, stages, strict=True):
            leg.graph = stage.call_id if batch.keep else None  # until it says otherwise
            stage.answered = self._learns(batch, leg, travel)
        reply = await Handover(stages).last()
        travel.end(len(legs) * stages[0].request.num_elements + reply.num_elements)
        check_forward(legs[-1].peer, requests[-1], _deep(batch, legs[-1]), reply)
        return ChainResult(reply.tensors["hidden"], reply.tensors.get("prefix"), legs, handed_over=True)

    async def backward(
        self, batch: MicroBatch, legs: list[Leg], grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> ChainGrads:
        """Gradients by the graphs that `forward` left, from the last server to the first. Raises as `forward`."""
        legs = legs[::-1]
        wire = self._view.wire_dtype(legs[0].peer)
        sent = [to_wire(tensor, wire) for tensor in (grad, grad_prefix) if tensor is not None]
        stages = []
        for leg in legs:
            own_wire = self._view.wire_dtype(leg.peer)
            grad_prefix = sent[1] if len(sent) > 1 else None
            most = grads_bytes(batch.hidden, batch.prefix, leg.end - leg.start)
            request = BackwardRequest(sent[0], grad_prefix, leg.graph, None, own_wire, answer_bytes=most)
            stages.append(self._stage(batch, leg, request.to_message(), BACKWARD_COST, is_last=leg is legs[-1]))
        replies = await Handover(stages).all()
        peers = [leg.peer for leg in legs]
        dtypes = [*map(self._view.wire_dtype, peers), *map(self._view.compute_dtype, peers)]
        deep = torch.zeros(batch.prompts.deep.shape) if batch.prompts is not None else None
        for leg, reply in zip(legs, replies, strict=True):
            own_deep, is_first = _deep(batch, leg), leg is legs[-1]
            asked = ForwardRequest(
                leg.start,
                leg.end,
                batch.hidden,
                batch.prefix if is_first else None,
                input_grad=is_first and batch.input_grad,
                wire_dtype=self._view.wire_dtype(leg.peer),
            )
            check_backward(leg.peer, asked, own_deep, sent, reply, may_overflow="float16" in dtypes)
            if deep is not None and batch.prompts is not None:
                deep[leg.start - batch.prompts.start : leg.end - batch.prompts.start] = reply.tensors["deep"].float()
            leg.connection = leg.graph = None  # consumed: who goes back once more starts from the first inputs
        return ChainGrads(replies[-1].tensors.get("hidden"), replies[-1].tensors.get("prefix"), deep)

    def _stage(self, batch: MicroBatch, leg: Leg, request: Message, cost: float, *, is_last: bool) -> Stage:
        assert isinstance(leg.connection, PeerConnection)
        leg.clock = ServiceClock()
        leg.clock.hold()
        # Before the last one, a server's time includes the way to the next, which is not known here.
        deadline = self._patience(batch, leg, cost).deadline if is_last else None
        return Stage(leg.connection, request, deadline=deadline, clock=leg.clock)

    def _patience(self, batch: MicroBatch, leg: Leg, cost: float) -> Patience:
        expected, is_measured = self._view.expected_seconds(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start)
        return patience(expected * cost, is_measured, self._view.config)

    async def _prompts_key(self, batch: MicroBatch, leg: Leg) -> int:
        """Registers the leg's deep prompts, unless its server has them."""
        assert isinstance(leg.connection, PeerConnection)
        assert batch.prompts is not None
        key, sent = await leg.connection.prompts_key(batch.prompts.version, leg.start, leg.end)
        if sent is not None:
            deep = _deep(batch, leg)
            assert deep is not None
            await leg.connection.give_prompts(key, to_wire(deep, self._view.wire_dtype(leg.peer), prompts=True), sent)
        return key

    def _learns(self, batch: MicroBatch, leg: Leg, travel: _Travel) -> Callable[[Message], None]:
        """Takes in what a server says of its forward; how long the way to it is cannot be learnt from that."""

        def learn(reply: Message) -> None:
            if reply.fields.get("kept") is not True:
                leg.graph = None
            compute, (hop, _) = seconds_of(reply, "compute"), self._view.expected_seconds(leg.peer, tokens=0, blocks=0)
            blocks = leg.end - leg.start
            self._view.paces.report_success(
                leg.peer, tokens=batch.tokens, blocks=blocks, compute=compute, elapsed=compute + hop
            )
            travel.stop(compute + seconds_of(reply, "queue"))

        return learn

    def _note(self, failure: PeerFailure, legs: list[Leg], attempts: Attempts) -> None:
        """Whose failure it is. A wrong answer or request may be the fault of a server before: directly, that shows."""
        if failure.code not in SHOWN_DIRECTLY and not isinstance(failure, WrongResult):
            own = next(leg for leg in legs if leg.peer == failure.peer)
            attempts.failed(failure, own.start, own.end)
            return
        for leg in legs:
            if failure.code == ErrorCode.PROMPTS_LOST.value:
                assert leg.connection is not None
                leg.connection.forget_prompts()
        self._view.handover.avoid([leg.peer for leg in legs], failure)


class _Travel:
    """Finds how long a request was on its way, between servers that answer in whatever order."""

    def __init__(self, view: SwarmView, peers: Sequence[str], *, is_measured: bool):
        self._view, self._peers, self._is_measured = view, peers, is_measured
        self._began, self._seconds, self._stops, self._elements = time.perf_counter(), 0.0, 0, 0

    def stop(self, seconds: float) -> None:
        """A server says for how long it had the request."""
        self._stops, self._seconds = self._stops + 1, self._seconds - seconds
        self._report()

    def end(self, num_elements: int) -> None:
        """The last answer is here; all trips together moved so many elements of tensors."""
        self._seconds, self._elements = self._seconds + time.perf_counter() - self._began, num_elements
        self._report()

    def _report(self) -> None:
        if self._is_measured and self._elements and self._stops == len(self._peers):
            round_trips = [self._view.round_trip(peer) for peer in self._peers]
            latency = (len(self._peers) + 1) / 2 * sum(round_trips) / len(self._peers)
            self._view.paces.report_travel(seconds=self._seconds - latency, num_elements=self._elements)


@dataclass
class _Way(Generic[T]):
    """One of two ways to the same result."""

    clock: ServiceClock
    run: Callable[[], Awaitable[T]]


class _Clocks(ServiceClock):
    """That of the server which has been at work for the longest."""

    def __init__(self, legs: Sequence[Leg]):
        super().__init__()
        self._legs = legs

    @property
    def late(self) -> float:
        return max(leg.clock.late for leg in self._legs)


def _deep(batch: MicroBatch, leg: Leg) -> torch.Tensor | None:
    return batch.prompts.between(leg.start, leg.end) if batch.prompts is not None else None
