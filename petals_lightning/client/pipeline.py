"""Runs a micro-batch through the segments of a route, forward and backward, and around servers that fail.

The client keeps what entered every segment until the step is done, so any of them can be run again anywhere: a server
that dies costs its own segment, not the step. A segment of several servers that fails is run again server by server:
inside of it nothing can be mended, and who is to blame does not show (`attempts`: what is tried again, how often). A
segment that is late is tried elsewhere too, answers that cannot be right count as failures, and a share is audited.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N rows that are read.
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
from petals_lightning.client.deadlines import BACKWARD_COST, Patience, ServiceClock, patience
from petals_lightning.client.exchange import Exchange, Stage
from petals_lightning.client.handover import may_be_anothers_fault
from petals_lightning.client.hedging import Run, race
from petals_lightning.client.router import Router
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.segments import ForwardResult, InputGrads, Leg, MicroBatch, Segment
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import check_backward, check_forward, seconds_of
from petals_lightning.errors import NonFiniteResult, PeerFailure, RetriesExhaustedError
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire

T = TypeVar("T")
Grads = tuple[torch.Tensor, torch.Tensor | None]
"""Gradients of a segment's outputs: hidden's, and [P, H] the prefix's or None."""


class Pipeline:
    """Blocks of one model on whatever servers there are. All methods belong to the node's loop.

    Args:
        servers, router: of the model.
        stats: counts retries, hedges and handovers.
        judge: computes here what servers disagree about, if this machine can.
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
        """Gradients of the inputs of `forward`, whose `result` must be of this batch. Raises as `forward`."""
        attempts, segments = self._attempts(), list(result.segments)
        deep = torch.zeros(batch.prompts.deep.shape) if batch.prompts is not None else None
        grads: Grads | None = grad, grad_prefix
        found: Tensors = {}
        while segments:
            segment = segments.pop()
            assert grads is not None
            if not self._can_go_back(segment, attempts):
                segments += await self._rebuild(batch, segment, attempts)
                continue
            try:
                found = await self._run_backward(batch, segment, grads, attempts)
            except PeerFailure as e:
                self._failed(e, segment, attempts)
                segments += await self._rebuild(batch, segment, attempts)
                continue
            if deep is not None and batch.prompts is not None:
                deep[segment.start - batch.prompts.start : segment.end - batch.prompts.start] = found["deep"]
            grads = (found["hidden"], found.get("prefix")) if "hidden" in found else None
        return InputGrads(found.get("hidden"), found.get("prefix"), deep)

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
                pass  # the leg's own request meets it too, and deals with it
        rest = iter(legs)
        return [[next(rest) for _ in range(size)] for size in sizes]

    async def _run_forward(
        self, batch: MicroBatch, segment: Segment, want_prefix: bool, attempts: Attempts
    ) -> tuple[list[Segment], Tensors]:
        """One segment forward, hedged and audited; returns the segments that answered. Raises PeerFailure."""

        async def here() -> tuple[list[Segment], Tensors]:
            return [segment], await self._ask_forward(batch, segment, want_prefix, attempts)

        async def again(route: list[RouteSpan]) -> Tensors:
            return (await self._forward_by(replace(batch, keep=False), segment, route, want_prefix))[1]

        elsewhere = partial(self._forward_by, batch, segment, want_prefix=want_prefix)
        answered, tensors = await self._hedged(batch, segment, 1.0, here, elsewhere, attempts)
        await self._audit(batch, answered, None, tensors, again)
        return answered, tensors

    async def _run_backward(self, batch: MicroBatch, segment: Segment, grads: Grads, attempts: Attempts) -> Tensors:
        """One segment backward, hedged and audited: gradients of hidden, prefix and deep. Raises PeerFailure."""

        async def here() -> tuple[list[Segment], Tensors]:
            return [segment], await self._ask_backward(batch, segment, grads, attempts)

        async def again(route: list[RouteSpan]) -> Tensors:
            return (await elsewhere(route))[1]

        elsewhere = partial(self._backward_by, batch, segment, grads)
        answered, found = await self._hedged(batch, segment, _backward_cost(segment), here, elsewhere, attempts)
        await self._audit(batch, answered, grads, found, again)
        return found

    async def _audit(
        self,
        batch: MicroBatch,
        answered: list[Segment],
        grads: Grads | None,
        tensors: Tensors,
        again: Callable[[list[RouteSpan]], Coroutine[Any, Any, Tensors]],
    ) -> None:
        """Raises WrongResult, see `Auditor.check`."""
        for segment in answered[:1]:  # where audits are on, there is one, of one server
            if not segment.is_handed_over:
                deep = batch.deep(segment.start, segment.end)
                await self._auditor.check(segment, deep, grads, tensors, again)

    async def _forward_by(
        self, batch: MicroBatch, segment: Segment, route: Sequence[RouteSpan], want_prefix: bool
    ) -> tuple[list[Segment], Tensors]:
        """What `segment` does, server by server along `route`, each asked once. Raises PeerFailure."""
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
        found: Tensors = {}
        deep: list[torch.Tensor] = []
        for part in reversed(done):
            found = await self._ask_backward(batch, part, grads, self._attempts())
            if "deep" in found:
                deep.insert(0, found["deep"])
            if "hidden" in found:
                grads = found["hidden"], found.get("prefix")
        return done, found | ({"deep": torch.cat(deep)} if deep else {})

    async def _hedged(
        self,
        batch: MicroBatch,
        segment: Segment,
        cost: float,
        here: Run[T],
        elsewhere: Callable[[list[RouteSpan]], Coroutine[Any, Any, T]],
        attempts: Attempts,
    ) -> T:
        """Runs a segment `here`, and if it is late also `elsewhere`, by other servers. Raises as `race`."""
        for leg in segment.legs:
            leg.clock = ServiceClock()
            leg.clock.hold()  # until the request is there
        segment.legs[0].clock.restart()

        def second() -> Run[T] | None:
            route = self._router.other_route(
                segment.start, segment.end, tokens=batch.tokens, avoid=[segment.slowest.peer]
            )
            if route is None or (len(route) > 1 and self._servers.config.audit_rate > 0):  # one server's can be audited
                return None
            return partial(elsewhere, route)

        hedges = [self._patience(batch, leg, cost).hedge for leg in segment.legs]
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
            self._router.handover.avoid(segment.peers, "another way was quicker")
        return result

    async def _ask_forward(self, batch: MicroBatch, segment: Segment, want_prefix: bool, attempts: Attempts) -> Tensors:
        """One forward request; its legs then know their graphs. Raises PeerFailure."""
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
                    leg.graph = stage.call_id if batch.keep else None  # until its server says otherwise
                    stage.answered = self._learns(batch, leg, is_alone=not segment.is_handed_over)
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
        """One backward request: by graph if the server has it, else with the inputs again. Raises PeerFailure."""
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
                    leg.connection = leg.graph = None  # used up: who goes back once more starts from the inputs
            found = {
                name: tensor for name in ("hidden", "prefix") if (tensor := replies[-1].tensors.get(name)) is not None
            }
            if batch.prompts is not None:
                found["deep"] = torch.cat([reply.tensors["deep"].float() for reply in reversed(replies)])
            return found

    def _check_grads(
        self,
        batch: MicroBatch,
        legs: Sequence[Leg],
        forwards: Sequence[ForwardRequest],
        sent: list[torch.Tensor],
        replies: Sequence[Message],
    ) -> None:
        """Raises WrongResult unless each leg, from the last to the first, answered gradients of what it had."""
        dtypes = [dtype(leg.peer) for leg in legs for dtype in (self._servers.wire_dtype, self._servers.compute_dtype)]
        for leg, forward, reply in zip(legs, forwards, replies, strict=True):
            if leg is not legs[-1]:  # these go to the server before, and only those of deep prompts come home
                forward = replace(forward, prefix=None, input_grad=False)
            deep = batch.deep(leg.start, leg.end)
            check_backward(leg.peer, forward, deep, sent, reply, may_overflow="float16" in dtypes)

    def _can_go_back(self, segment: Segment, attempts: Attempts) -> bool:
        """Whether servers that hand over all have their graphs still. One alone is sent its inputs again."""
        if not segment.is_handed_over:
            return True
        for leg in segment.legs:
            if leg.connection is not None and not leg.connection.is_open:  # the pool was told; this step pays for it
                attempts.count(PeerFailure(leg.peer, "its stream ended between forward and backward"))
        if not self._router.handover.allows([leg.connection for leg in segment.legs]):
            return False
        if any(leg.graph is None for leg in segment.legs):
            self._router.handover.avoid(segment.peers, "they have no room for graphs")
            return False
        return True

    async def _rebuild(self, batch: MicroBatch, segment: Segment, attempts: Attempts) -> list[Segment]:
        """Segments that take the place of one whose server is lost.

        All but the last are run; the last runs with its backward, in one request.
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
        """Returns if the same server is to be asked again, with what it says that it has lost; each once.

        Raises:
            PeerFailure: another failure; or one behind a handover, where it does not show who has lost it.
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
        """Takes in a segment's failure. Returns if its blocks are to be tried again. Raises as `Attempts.failed`."""
        if segment.is_handed_over and may_be_anothers_fault(failure):
            for leg in segment.legs:
                if failure.code == ErrorCode.PROMPTS_LOST.value and leg.connection is not None:
                    leg.connection.forget_prompts()
            self._router.handover.avoid(segment.peers, failure)
            return
        own = next((leg for leg in segment.legs if leg.peer == failure.peer), segment)
        attempts.failed(failure, own.start, own.end)

    def _confirm(self, failure: NonFiniteResult, segment: Segment, batch: MicroBatch, attempts: Attempts) -> None:
        """Returns if two servers say the same: then it is the model that overflows, and the caller shall see it.

        Raises:
            NonFiniteResult: it is the first to say so; or it came by a handover.
            RetriesExhaustedError: it says so again, and there is nobody else to ask.
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
                f"{failure}, twice, and nobody else holds blocks {segment.start}:{segment.end}. If the model overflows "
                "in float16, its servers should use --dtype bfloat16 or float32"
            ) from failure
        attempts.not_finite.add(failure.peer)
        raise failure

    def _forward_requests(
        self, batch: MicroBatch, segment: Segment, want_prefix: bool, *, is_sent: bool = True
    ) -> list[ForwardRequest]:
        """A request for each leg. All have the first one's inputs: what enters the others is not known here.

        `is_sent`: inputs are in the dtype for the wire.
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
        """Makes sure that servers have the deep prompts of their blocks, and names them in the requests."""
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
            # Before the last one, a server's time includes the way to the next, which is not known here.
            deadline = self._patience(batch, leg, cost).deadline if leg is legs[-1] else None
            stages.append(Stage(leg.connection, message, deadline=deadline, clock=leg.clock))
        return stages

    def _learns(self, batch: MicroBatch, leg: Leg, *, is_alone: bool) -> Callable[[Message], None]:
        """Takes in what a server says of its forward: speeds are compared, so they are all taken from forwards."""
        began = time.perf_counter()

        def learn(reply: Message) -> None:
            if reply.fields.get("kept") is not True:
                leg.graph = None
            compute = seconds_of(reply, "compute")
            if is_alone:
                elapsed = time.perf_counter() - began - seconds_of(reply, "queue")
            else:  # how long the way to it is cannot be learnt behind a handover
                elapsed = compute + self._router.expected_seconds(leg.peer, tokens=0, blocks=0)[0]
            self._servers.speeds.report_success(
                leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start, compute=compute, elapsed=elapsed
            )

        return learn

    def _patience(self, batch: MicroBatch, leg: Leg, cost: float) -> Patience:
        expected, is_measured = self._router.expected_seconds(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start)
        return patience(expected * cost, is_measured, self._servers.config)

    def _attempts(self) -> Attempts:
        return Attempts(self._servers, self._router, self._stats)


def _backward_cost(segment: Segment) -> float:
    """In forwards: without the graph, the server has to run the forward again first."""
    return BACKWARD_COST if segment.legs[0].graph is not None else 1.0 + BACKWARD_COST
