"""Runs a micro-batch through the segments of a route, forward and backward, and recovers from servers that fail.

The client keeps the inputs of every segment until the step is done, so that any of them can run again anywhere: a
failed server costs its own segment, not the step. A failed segment of several servers runs again server by server,
because the failure does not show which of them is at fault (`attempts`: what is tried again, and how often). A late
segment is also tried elsewhere, answers that cannot be right count as failures, and a share of answers is audited.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N positions that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.audit import Auditor, Judge
from petals_lightning.client.handover import may_be_anothers_fault
from petals_lightning.client.hedging import Run, race
from petals_lightning.client.router import Router
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.segment_requests import Grads, SegmentRequests, Tensors, backward_cost
from petals_lightning.client.segments import ForwardResult, InputGrads, Leg, MicroBatch, Segment
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.errors import PeerFailure
from petals_lightning.protocol.adapters import Adapter, float_zeros
from petals_lightning.protocol.messages import ErrorCode

T = TypeVar("T")


class Pipeline:
    """Runs blocks of one model on the servers of a swarm. All methods belong to the node's loop.

    Args:
        servers, router: of the model.
        stats: counts retries, hedges and handovers.
        judge: computes blocks on this machine when servers disagree; None if it cannot.
    """

    def __init__(self, servers: ServerPool, router: Router, stats: TransferStats, judge: Judge | None = None):
        self._servers, self._router, self._stats = servers, router, stats
        self._requests = SegmentRequests(servers, router)
        self._auditor = Auditor(servers, router, stats, judge)

    async def forward(self, batch: MicroBatch, end: int, *, want_prefix: bool) -> ForwardResult:
        """Runs blocks [batch.start, end).

        Raises:
            RetriesExhaustedError, NoServersError, RemoteRequestError: see `errors`.
        """
        return await self._forward(batch, end, want_prefix, self._attempts())

    async def past(self, prefix: torch.Tensor, past: Adapter) -> None:
        """Fills `past` with the keys and values that its blocks make of a prefix [P, H]. Raises as `forward`."""
        batch = MicroBatch(past.start, prefix[None, -1:], prefix, None, None, input_grad=False, keep=False, past=past)
        await self._forward(batch, past.end, True, self._attempts(), one_by_one=True)  # each server answers

    async def backward(
        self, batch: MicroBatch, result: ForwardResult, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> InputGrads:
        """Gradients of the inputs of `forward`; `result` is its result for this batch. Raises as `forward`."""
        attempts, segments = self._attempts(), list(result.segments)
        adapter_grads = float_zeros(batch.adapter) if batch.adapter is not None else None
        grads: Grads | None = grad, grad_prefix
        input_grads: Tensors = {}
        while segments:
            segment = segments.pop()
            assert grads is not None
            if not self._can_go_back(segment, attempts):
                segments += await self._rebuild(batch, segment, attempts)
                continue
            try:
                input_grads = await self._run_backward(batch, segment, grads, attempts)
            except PeerFailure as e:
                self._failed(e, segment, attempts)
                segments += await self._rebuild(batch, segment, attempts)
                continue
            if adapter_grads is not None:
                adapter_grads.between(segment.start, segment.end).copy_(input_grads)
            grads = (input_grads["hidden"], input_grads.get("prefix")) if "hidden" in input_grads else None
        return InputGrads(input_grads.get("hidden"), input_grads.get("prefix"), adapter_grads)

    async def _forward(
        self, batch: MicroBatch, end: int, want_prefix: bool, attempts: Attempts, *, one_by_one: bool = False
    ) -> ForwardResult:
        done: list[Segment] = []
        hidden, prefix, start = batch.hidden, batch.prefix, batch.start
        todo = await self._plan(batch, start, end, one_by_one)
        while todo:
            legs = todo.pop(0)
            is_last = legs[-1].end == end
            segment = Segment(legs, hidden, prefix, batch.rows if is_last else None)
            try:
                answered, tensors = await self._run_forward(batch, segment, want_prefix or not is_last, attempts)
            except PeerFailure as e:
                self._failed(e, segment, attempts)
                todo = await self._plan(batch, segment.start, end, one_by_one=True)
                continue
            done += answered
            hidden, prefix = tensors["hidden"], tensors.get("prefix")
        return ForwardResult(hidden, prefix, done)

    async def _plan(self, batch: MicroBatch, start: int, end: int, one_by_one: bool) -> list[list[Leg]]:
        """Legs through blocks [start, end), grouped into segments."""
        route = await self._router.route(start, end, tokens=batch.tokens)
        legs = [Leg(planned.start, planned.end, planned.peer_id) for planned in route]
        sizes = [1] * len(legs)
        if not one_by_one and len(legs) > 1 and self._router.handover.is_on:
            try:
                for leg in legs:
                    leg.connection = await self._servers.connection(leg.peer)
                sizes = self._router.handover.group([leg.connection for leg in legs])
            except PeerFailure:
                pass  # the leg's own request will fail too, and handle it
        rest = iter(legs)
        return [[next(rest) for _ in range(size)] for size in sizes]

    async def _run_forward(
        self, batch: MicroBatch, segment: Segment, want_prefix: bool, attempts: Attempts
    ) -> tuple[list[Segment], Tensors]:
        """Runs one segment forward, hedged and audited. Returns the segments that answered. Raises PeerFailure."""

        async def here() -> tuple[list[Segment], Tensors]:
            return [segment], await self._requests.forward(batch, segment, want_prefix, attempts)

        async def recompute(route: list[RouteSpan]) -> Tensors:
            return (await self._forward_by(replace(batch, keep=False), segment, route, want_prefix))[1]

        elsewhere = partial(self._forward_by, batch, segment, want_prefix=want_prefix)
        answered, tensors = await self._hedged(batch, segment, 1.0, here, elsewhere, attempts)
        await self._audit(batch, answered, None, tensors, recompute)
        return answered, tensors

    async def _run_backward(self, batch: MicroBatch, segment: Segment, grads: Grads, attempts: Attempts) -> Tensors:
        """Runs one segment backward, hedged and audited. Returns gradients of hidden, prefix and adapter.

        Raises:
            PeerFailure: a server failed.
        """

        async def here() -> tuple[list[Segment], Tensors]:
            return [segment], await self._requests.backward(batch, segment, grads, attempts)

        async def recompute(route: list[RouteSpan]) -> Tensors:
            return (await elsewhere(route))[1]

        elsewhere = partial(self._backward_by, batch, segment, grads)
        answered, result = await self._hedged(batch, segment, backward_cost(segment), here, elsewhere, attempts)
        await self._audit(batch, answered, grads, result, recompute)
        return result

    async def _audit(
        self,
        batch: MicroBatch,
        answered: list[Segment],
        grads: Grads | None,
        tensors: Tensors,
        recompute: Callable[[list[RouteSpan]], Coroutine[Any, Any, Tensors]],
    ) -> None:
        """Audits an answer. Raises WrongResult, see `Auditor.check`."""
        if self._servers.config.audit_rate > 0:
            (segment,) = answered  # one, of one server: nothing is handed over then, and a hedge goes to one server
            adapter = batch.adapter_of(segment.start, segment.end)
            await self._auditor.check(segment, adapter, grads, tensors, recompute)

    async def _forward_by(
        self, batch: MicroBatch, segment: Segment, route: Sequence[RouteSpan], want_prefix: bool
    ) -> tuple[list[Segment], Tensors]:
        """Runs `segment` server by server along `route`, asking each server once. Raises PeerFailure."""
        done: list[Segment] = []
        hidden, prefix, tensors = segment.hidden, segment.prefix, {}
        for planned in route:
            is_last = planned.end == segment.end
            leg = Leg(planned.start, planned.end, planned.peer_id)
            part = Segment([leg], hidden, prefix, segment.rows if is_last else None)
            tensors = await self._requests.forward(batch, part, want_prefix or not is_last, self._attempts())
            done.append(part)
            hidden, prefix = tensors["hidden"], tensors.get("prefix")
        return done, tensors

    async def _backward_by(
        self, batch: MicroBatch, segment: Segment, grads: Grads, route: Sequence[RouteSpan]
    ) -> tuple[list[Segment], Tensors]:
        """As `_forward_by`, with gradients of the segment's inputs."""
        done, _ = await self._forward_by(batch, segment, route, grads[1] is not None)
        result: Tensors = {}
        adapter = batch.adapter_of(segment.start, segment.end)
        adapter_grads = float_zeros(adapter) if adapter is not None else None
        for part in reversed(done):
            result = await self._requests.backward(batch, part, grads, self._attempts())
            if adapter_grads is not None:
                adapter_grads.between(part.start, part.end).copy_(result)
            if "hidden" in result:
                grads = result["hidden"], result.get("prefix")
        result = {name: grad for name, grad in result.items() if name in ("hidden", "prefix")}
        return done, result | (adapter_grads.tensors() if adapter_grads is not None else {})

    async def _hedged(
        self,
        batch: MicroBatch,
        segment: Segment,
        cost: float,
        here: Run[T],
        elsewhere: Callable[[list[RouteSpan]], Coroutine[Any, Any, T]],
        attempts: Attempts,
    ) -> T:
        """Runs a segment `here`, and also `elsewhere`, on other servers, if it is late. Raises as `race`."""
        for leg in segment.legs:
            leg.clock = ServiceTimer()
            leg.clock.pause()  # until the request has arrived
        segment.legs[0].clock.restart()

        def second() -> Run[T] | None:
            route = self._router.other_route(
                segment.start, segment.end, tokens=batch.tokens, avoid=[segment.slowest.peer]
            )
            if route is None or (len(route) > 1 and self._servers.config.audit_rate > 0):  # audits need one server
                return None
            return partial(elsewhere, route)

        hedges = [self._requests.timeouts(batch, leg, cost).hedge for leg in segment.legs]
        result, was_here = await race(
            here,
            second,
            after=max((hedge for hedge in hedges if hedge is not None), default=None),
            late=lambda: max(leg.clock.late for leg in segment.legs),
            on_failure=lambda failure: self._failed(failure, segment, attempts),
        )
        if was_here:
            self._stats.handovers += segment.is_handed_over
            return result
        self._stats.hedges += 1
        late = segment.slowest
        self._servers.speeds.report_slow(
            late.peer, tokens=batch.tokens, blocks=late.end - late.start, elapsed=late.clock.lost / cost
        )
        if segment.is_handed_over:
            self._router.handover.avoid(segment.peers, "another route was faster")
        return result

    def _can_go_back(self, segment: Segment, attempts: Attempts) -> bool:
        """Whether all servers of a hand-over still have their graphs. A single server is sent its inputs again."""
        if not segment.is_handed_over:
            return True
        for leg in segment.legs:
            if leg.connection is not None and not leg.connection.is_open:  # the pool knows; count it for this step too
                attempts.count(PeerFailure(leg.peer, "its stream ended between forward and backward"))
        if not self._router.handover.allows([leg.connection for leg in segment.legs]):
            return False
        if any(leg.graph is None for leg in segment.legs):
            self._router.handover.avoid(segment.peers, "they have no room for graphs")
            return False
        return True

    async def _rebuild(self, batch: MicroBatch, segment: Segment, attempts: Attempts) -> list[Segment]:
        """The segments that replace one whose server is lost.

        All but the last are run here; the last runs together with its backward, in one request.
        """
        *before, last = await self._router.route(segment.start, segment.end, tokens=batch.tokens)
        hidden, prefix, done = segment.hidden, segment.prefix, []
        if before:
            inner = replace(
                batch, start=segment.start, hidden=hidden, prefix=prefix, rows=None,
                input_grad=batch.input_grad or segment.start > batch.start,
            )  # fmt: skip
            result = await self._forward(inner, last.start, True, attempts, one_by_one=True)
            hidden, prefix, done = result.hidden, result.prefix, result.segments
        return [*done, Segment([Leg(last.start, last.end, last.peer_id)], hidden, prefix, segment.rows)]

    def _failed(self, failure: PeerFailure, segment: Segment, attempts: Attempts) -> None:
        """Handles a segment's failure. Returns if its blocks should be tried again. Raises as `Attempts.failed`."""
        if segment.is_handed_over and may_be_anothers_fault(failure):
            for leg in segment.legs:
                if failure.code == ErrorCode.ADAPTER_LOST.value and leg.connection is not None:
                    leg.connection.forget_adapters()
            self._router.handover.avoid(segment.peers, failure)
            return
        own = next((leg for leg in segment.legs if leg.peer == failure.peer), segment)
        attempts.failed(failure, own.start, own.end)

    def _attempts(self) -> Attempts:
        return Attempts(self._servers, self._router, self._stats)
