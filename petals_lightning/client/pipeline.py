"""Runs a micro-batch through the segments of a route, forward and backward, and recovers from servers that fail.

The client keeps the inputs of every segment until the step is done, so that any of them can run again anywhere: a
failed server costs its own segment, not the step. A failed segment of several servers runs again server by server,
because the failure does not show which of them is at fault (`attempts`: what is tried again, and how often). A late
segment is also tried elsewhere, answers that cannot be right count as failures, and a share of answers is audited.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N positions that are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.audit import Auditor, Judge, Tensors
from petals_lightning.client.exchange import Exchange, Stage
from petals_lightning.client.handover import may_be_anothers_fault
from petals_lightning.client.hedging import Run, race
from petals_lightning.client.router import Router
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.segments import ForwardResult, InputGrads, Leg, MicroBatch, Segment
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.timeouts import BACKWARD_COST, RequestTimeouts, ServiceTimer, request_timeouts
from petals_lightning.client.validation import check_backward, check_forward, reported_seconds
from petals_lightning.errors import NonFiniteResult, PeerFailure, RetriesExhaustedError
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire

T = TypeVar("T")
Grads = tuple[torch.Tensor, torch.Tensor | None]
"""Gradients of a segment's outputs: hidden's, and [P, H] the prefix's or None."""


class Pipeline:
    """Runs blocks of one model on the servers of a swarm. All methods belong to the node's loop.

    Args:
        servers, router: of the model.
        stats: counts retries, hedges and handovers.
        judge: computes blocks on this machine when servers disagree; None if it cannot.
    """

    def __init__(self, servers: ServerPool, router: Router, stats: TransferStats, judge: Judge | None = None):
        self._servers, self._router, self._stats = servers, router, stats
        self._auditor = Auditor(servers, router, stats, judge)

    async def forward(self, batch: MicroBatch, end: int, *, want_prefix: bool) -> ForwardResult:
        """Runs blocks [batch.start, end).

        Raises:
            RetriesExhaustedError, NoServersError, RemoteRequestError: see `errors`.
        """
        return await self._forward(batch, end, want_prefix, self._attempts())

    async def backward(
        self, batch: MicroBatch, result: ForwardResult, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> InputGrads:
        """Gradients of the inputs of `forward`; `result` is its result for this batch. Raises as `forward`."""
        attempts, segments = self._attempts(), list(result.segments)
        deep = torch.zeros(batch.prompts.deep.shape) if batch.prompts is not None else None
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
            if deep is not None and batch.prompts is not None:
                deep[segment.start - batch.prompts.start : segment.end - batch.prompts.start] = input_grads["deep"]
            grads = (input_grads["hidden"], input_grads.get("prefix")) if "hidden" in input_grads else None
        return InputGrads(input_grads.get("hidden"), input_grads.get("prefix"), deep)

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
            return [segment], await self._ask_forward(batch, segment, want_prefix, attempts)

        async def recompute(route: list[RouteSpan]) -> Tensors:
            return (await self._forward_by(replace(batch, keep=False), segment, route, want_prefix))[1]

        elsewhere = partial(self._forward_by, batch, segment, want_prefix=want_prefix)
        answered, tensors = await self._hedged(batch, segment, 1.0, here, elsewhere, attempts)
        await self._audit(batch, answered, None, tensors, recompute)
        return answered, tensors

    async def _run_backward(self, batch: MicroBatch, segment: Segment, grads: Grads, attempts: Attempts) -> Tensors:
        """Runs one segment backward, hedged and audited. Returns gradients of hidden, prefix and deep prompts.

        Raises:
            PeerFailure: a server failed.
        """

        async def here() -> tuple[list[Segment], Tensors]:
            return [segment], await self._ask_backward(batch, segment, grads, attempts)

        async def recompute(route: list[RouteSpan]) -> Tensors:
            return (await elsewhere(route))[1]

        elsewhere = partial(self._backward_by, batch, segment, grads)
        answered, result = await self._hedged(batch, segment, _backward_cost(segment), here, elsewhere, attempts)
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
        for segment in answered[:1]:  # with audits on, there is one segment, of one server
            if not segment.is_handed_over:
                deep = batch.deep(segment.start, segment.end)
                await self._auditor.check(segment, deep, grads, tensors, recompute)

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
            tensors = await self._ask_forward(batch, part, want_prefix or not is_last, self._attempts())
            done.append(part)
            hidden, prefix = tensors["hidden"], tensors.get("prefix")
        return done, tensors

    async def _backward_by(
        self, batch: MicroBatch, segment: Segment, grads: Grads, route: Sequence[RouteSpan]
    ) -> tuple[list[Segment], Tensors]:
        """As `_forward_by`, with gradients of the segment's inputs."""
        done, _ = await self._forward_by(batch, segment, route, grads[1] is not None)
        result: Tensors = {}
        deep: list[torch.Tensor] = []
        for part in reversed(done):
            result = await self._ask_backward(batch, part, grads, self._attempts())
            if "deep" in result:
                deep.insert(0, result["deep"])
            if "hidden" in result:
                grads = result["hidden"], result.get("prefix")
        return done, result | ({"deep": torch.cat(deep)} if deep else {})

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

        hedges = [self._timeouts(batch, leg, cost).hedge for leg in segment.legs]
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

    async def _ask_forward(self, batch: MicroBatch, segment: Segment, want_prefix: bool, attempts: Attempts) -> Tensors:
        """Sends one forward request, and notes the graphs that servers keep. Raises PeerFailure."""
        for leg in segment.legs:
            if leg.connection is None or not leg.connection.is_open:
                leg.connection = await self._servers.connection(leg.peer)
        lost: set[str] = set()
        while True:
            requests = self._forward_requests(batch, segment, want_prefix)
            try:
                await self._register_prompts(batch, segment.legs, requests)
                stages = self._stages(batch, segment.legs, [request.to_message() for request in requests], 1.0)
                for leg, stage in zip(segment.legs, stages, strict=True):
                    leg.graph = stage.call_id if batch.keep else None  # unless its server reports otherwise
                    stage.answered = self._speed_learner(batch, leg, is_alone=not segment.is_handed_over)
                reply = await Exchange(stages).last()
            except PeerFailure as e:
                self._mend(e, segment, lost, attempts)
                continue
            last = segment.legs[-1]
            try:
                check_forward(last.peer, requests[-1], batch.deep(last.start, last.end), reply)
            except NonFiniteResult as e:
                self._confirm(e, segment, batch, attempts)
            return reply.tensors

    async def _ask_backward(self, batch: MicroBatch, segment: Segment, grads: Grads, attempts: Attempts) -> Tensors:
        """Sends one backward request: by graph if the server has it, else with the inputs. Raises PeerFailure."""
        legs = segment.legs[::-1]
        for leg in legs:
            if leg.connection is None or not leg.connection.is_open:
                leg.connection, leg.graph = await self._servers.connection(leg.peer), None  # graphs end with streams
        lost: set[str] = set()
        while True:
            is_sent = legs[0].graph is None
            forwards = self._forward_requests(batch, segment, want_prefix=False, is_sent=is_sent)[::-1]
            wire = self._servers.wire_dtype(legs[0].peer)
            sent = [to_wire(tensor, wire) for tensor in grads if tensor is not None]
            try:
                if is_sent:
                    await self._register_prompts(batch, legs, forwards)
                requests = [
                    BackwardRequest(
                        sent[0],
                        sent[1] if len(sent) > 1 else None,
                        leg.graph,
                        forward if is_sent else None,
                        forward.wire_dtype,
                        answer_bytes=forward.grads_bytes,
                    )
                    for leg, forward in zip(legs, forwards, strict=True)
                ]
                stages = self._stages(
                    batch, legs, [request.to_message() for request in requests], _backward_cost(segment)
                )
                replies = await Exchange(stages).all()
            except PeerFailure as e:
                self._mend(e, segment, lost, attempts)
                continue
            try:
                self._check_grads(batch, legs, forwards, sent, replies)
            except NonFiniteResult as e:
                self._confirm(e, segment, batch, attempts)
            if segment.is_handed_over:
                for leg in legs:
                    leg.connection = leg.graph = None  # the graph is used up: another backward starts from the inputs
            sums = {
                name: tensor for name in ("hidden", "prefix") if (tensor := replies[-1].tensors.get(name)) is not None
            }
            if batch.prompts is not None:
                sums["deep"] = torch.cat([reply.tensors["deep"].float() for reply in reversed(replies)])
            return sums

    def _check_grads(
        self,
        batch: MicroBatch,
        legs: Sequence[Leg],
        forwards: Sequence[ForwardRequest],
        sent: list[torch.Tensor],
        replies: Sequence[Message],
    ) -> None:
        """Raises WrongResult unless each leg, from last to first, answered with gradients of its inputs."""
        dtypes = [dtype(leg.peer) for leg in legs for dtype in (self._servers.wire_dtype, self._servers.compute_dtype)]
        for leg, forward, reply in zip(legs, forwards, replies, strict=True):
            if leg is not legs[-1]:  # these go to the previous server; only deep prompts' gradients come to the client
                forward = replace(forward, prefix=None, input_grad=False)
            deep = batch.deep(leg.start, leg.end)
            check_backward(leg.peer, forward, deep, sent, reply, may_overflow="float16" in dtypes)

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

    def _mend(self, failure: PeerFailure, segment: Segment, lost: set[str], attempts: Attempts) -> None:
        """Returns if the same server should be asked again, with what it has lost (each kind of loss once).

        Raises:
            PeerFailure: any other failure, or one in a hand-over, where the server that lost it is unknown.
        """
        leg = segment.legs[0]
        if segment.is_handed_over or failure.code is None or failure.code in lost:
            raise failure
        if failure.code == ErrorCode.GRAPH_LOST.value:
            leg.graph = None
        elif failure.code == ErrorCode.PROMPTS_LOST.value and leg.connection is not None:
            leg.connection.forget_prompts()
        else:
            raise failure
        lost.add(failure.code)
        attempts.count(failure)

    def _failed(self, failure: PeerFailure, segment: Segment, attempts: Attempts) -> None:
        """Handles a segment's failure. Returns if its blocks should be tried again. Raises as `Attempts.failed`."""
        if segment.is_handed_over and may_be_anothers_fault(failure):
            for leg in segment.legs:
                if failure.code == ErrorCode.PROMPTS_LOST.value and leg.connection is not None:
                    leg.connection.forget_prompts()
            self._router.handover.avoid(segment.peers, failure)
            return
        own = next((leg for leg in segment.legs if leg.peer == failure.peer), segment)
        attempts.failed(failure, own.start, own.end)

    def _confirm(self, failure: NonFiniteResult, segment: Segment, batch: MicroBatch, attempts: Attempts) -> None:
        """Returns if two servers give the same result: then the model overflows, and the caller should see it.

        Raises:
            NonFiniteResult: it is the first such result, or it came through a hand-over.
            RetriesExhaustedError: the server repeats it, and no other server can be asked.
        """
        if segment.is_handed_over:
            raise failure
        for other in attempts.not_finite - {failure.peer}:
            self._servers.forgive(other)
            return
        blocks = segment.start, segment.end
        is_alone = self._router.other_route(*blocks, tokens=batch.tokens, avoid=[failure.peer]) is None
        if failure.peer in attempts.not_finite and is_alone:
            raise RetriesExhaustedError(
                f"{failure}, twice, and no other server holds blocks {segment.start}:{segment.end}. If the model "
                f"overflows in float16, its servers should use --dtype bfloat16 or float32"
            ) from failure
        attempts.not_finite.add(failure.peer)
        raise failure

    def _forward_requests(
        self, batch: MicroBatch, segment: Segment, want_prefix: bool, *, is_sent: bool = True
    ) -> list[ForwardRequest]:
        """A request for each leg. All have the first leg's inputs, because the inputs of the others are not known here.

        `is_sent`: convert the inputs to the dtype for the wire.
        """
        hidden, prefix = segment.hidden, segment.prefix
        if is_sent:
            entering = self._servers.wire_dtype(segment.legs[0].peer)
            hidden = to_wire(hidden, entering)
            prefix = to_wire(prefix, entering, prompts=True) if prefix is not None else None
        return [
            ForwardRequest(
                start=leg.start,
                end=leg.end,
                hidden=hidden,
                prefix=prefix,
                rows=segment.rows,
                keep=batch.keep,
                input_grad=batch.input_grad or leg.start > batch.start,
                want_prefix=prefix is not None and (want_prefix or leg is not segment.legs[-1]),
                wire_dtype=self._servers.wire_dtype(leg.peer),
            )
            for leg in segment.legs
        ]

    async def _register_prompts(
        self, batch: MicroBatch, legs: Sequence[Leg], requests: Sequence[ForwardRequest]
    ) -> None:
        """Registers deep prompts with the servers of their blocks, and puts their keys into the requests."""
        if batch.prompts is None:
            return
        for leg, request in zip(legs, requests, strict=True):
            assert leg.connection is not None
            deep = to_wire(batch.prompts.between(leg.start, leg.end), request.wire_dtype, prompts=True)
            request.prompts_key = await leg.connection.register_prompts(batch.prompts.version, leg.start, deep)

    def _stages(self, batch: MicroBatch, legs: Sequence[Leg], messages: Sequence[Message], cost: float) -> list[Stage]:
        stages = []
        for leg, message in zip(legs, messages, strict=True):
            assert leg.connection is not None
            # For all but the last, a server's time includes the unknown time of sending to the next one.
            deadline = self._timeouts(batch, leg, cost).deadline if leg is legs[-1] else None
            stages.append(Stage(leg.connection, message, deadline=deadline, clock=leg.clock))
        return stages

    def _speed_learner(self, batch: MicroBatch, leg: Leg, *, is_alone: bool) -> Callable[[Message], None]:
        """Updates speed estimates from a forward. All speeds come from forwards, so that they can be compared."""
        began = time.perf_counter()

        def learn(reply: Message) -> None:
            if reply.fields.get("kept") is not True:
                leg.graph = None
            compute = reported_seconds(reply, "compute")
            if is_alone:
                elapsed = time.perf_counter() - began - reported_seconds(reply, "queue")
            else:  # a hand-over does not show the round trip to this server
                elapsed = compute + self._router.expected_seconds(leg.peer, tokens=0, blocks=0)[0]
            self._servers.speeds.report_success(
                leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start, compute=compute, elapsed=elapsed
            )

        return learn

    def _timeouts(self, batch: MicroBatch, leg: Leg, cost: float) -> RequestTimeouts:
        expected, is_measured = self._router.expected_seconds(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start)
        return request_timeouts(expected * cost, is_measured, self._servers.config)

    def _attempts(self) -> Attempts:
        return Attempts(self._servers, self._router, self._stats)


def _backward_cost(segment: Segment) -> float:
    """Cost in units of a forward: without its graph, the server runs the forward again first."""
    return BACKWARD_COST if segment.legs[0].graph is not None else 1.0 + BACKWARD_COST
