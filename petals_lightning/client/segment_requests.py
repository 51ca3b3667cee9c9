"""One segment's request, forward or backward: what is sent, what must come back, and what is learnt from it.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N positions that are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.exchange import Exchange, Stage
from petals_lightning.client.router import Router
from petals_lightning.client.segments import Leg, MicroBatch, Segment
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.timeouts import BACKWARD_COST, RequestTimeouts, request_timeouts
from petals_lightning.client.validation import check_backward, check_forward, reported_seconds
from petals_lightning.errors import NonFiniteResult, PeerFailure, RetriesExhaustedError
from petals_lightning.protocol.adapters import float_zeros
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire

Tensors = dict[str, torch.Tensor]
Grads = tuple[torch.Tensor, torch.Tensor | None]
"""Gradients of a segment's outputs: hidden's, and [P, H] the prefix's or None."""


class SegmentRequests:
    """Asks the servers of a segment, once; only what a server says that it has lost is sent to it again.

    All methods belong to the node's loop.

    Args:
        servers, router: of the model.
    """

    def __init__(self, servers: ServerPool, router: Router):
        self._servers, self._router = servers, router

    async def forward(self, batch: MicroBatch, segment: Segment, want_prefix: bool, attempts: Attempts) -> Tensors:
        """Sends one forward request, and notes the graphs that servers keep. Raises PeerFailure."""
        for leg in segment.legs:
            if leg.connection is None or not leg.connection.is_open:
                leg.connection = await self._servers.connection(leg.peer)
        lost: set[str] = set()
        while True:
            requests = self._forward_requests(batch, segment, want_prefix)
            try:
                await self._register_adapter(segment.legs, requests)
                stages = self._stages(batch, segment.legs, [request.to_message() for request in requests], 1.0)
                for leg, stage in zip(segment.legs, stages, strict=True):
                    leg.graph = stage.call_id if batch.keep else None  # unless its server reports otherwise
                    stage.answered = self._speed_learner(batch, leg, is_alone=not segment.is_handed_over)
                reply = await Exchange(stages).last()
            except PeerFailure as e:
                self._mend(e, segment, lost, attempts)
                continue
            try:
                check_forward(segment.legs[-1].peer, requests[-1], reply)
            except NonFiniteResult as e:
                self._confirm(e, segment, batch, attempts)
            if (past := requests[-1].past) is not None:
                past.copy_(reply.tensors)
            return reply.tensors

    async def backward(self, batch: MicroBatch, segment: Segment, grads: Grads, attempts: Attempts) -> Tensors:
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
                    await self._register_adapter(legs, forwards)
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
                    batch, legs, [request.to_message() for request in requests], backward_cost(segment)
                )
                replies = await Exchange(stages).all()
            except PeerFailure as e:
                self._mend(e, segment, lost, attempts)
                continue
            try:
                self._check_grads(legs, forwards, sent, replies)
            except NonFiniteResult as e:
                self._confirm(e, segment, batch, attempts)
            if segment.is_handed_over:
                for leg in legs:
                    leg.connection = leg.graph = None  # the graph is used up: another backward starts from the inputs
            sums = {
                name: tensor for name in ("hidden", "prefix") if (tensor := replies[-1].tensors.get(name)) is not None
            }
            if (adapter := batch.adapter_of(segment.start, segment.end)) is not None:
                adapter_grads = float_zeros(adapter)
                for leg, reply in zip(legs, replies, strict=True):
                    adapter_grads.between(leg.start, leg.end).copy_(reply.tensors)
                sums |= adapter_grads.tensors()
            return sums

    def _check_grads(
        self,
        legs: Sequence[Leg],
        forwards: Sequence[ForwardRequest],
        sent: list[torch.Tensor],
        replies: Sequence[Message],
    ) -> None:
        """Raises WrongResult unless each leg, from last to first, answered with gradients of its inputs."""
        dtypes = [dtype(leg.peer) for leg in legs for dtype in (self._servers.wire_dtype, self._servers.compute_dtype)]
        for leg, forward, reply in zip(legs, forwards, replies, strict=True):
            if leg is not legs[-1]:  # these go to the previous server; only the adapter's gradients come to the client
                forward = replace(forward, prefix=None, input_grad=False)
            check_backward(leg.peer, forward, sent, reply, may_overflow="float16" in dtypes)

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
        elif failure.code == ErrorCode.ADAPTER_LOST.value and leg.connection is not None:
            leg.connection.forget_adapters()
        else:
            raise failure
        lost.add(failure.code)
        attempts.count(failure)

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
            prefix = to_wire(prefix, entering, shared=True) if prefix is not None else None
        return [
            ForwardRequest(
                start=leg.start,
                end=leg.end,
                hidden=hidden,
                prefix=prefix,
                adapter=batch.adapter_of(leg.start, leg.end),
                rows=segment.rows,
                keep=batch.keep,
                input_grad=batch.input_grad or leg.start > batch.start,
                want_prefix=prefix is not None and (want_prefix or leg is not segment.legs[-1]),
                wire_dtype=self._servers.wire_dtype(leg.peer),
                want_past=batch.past is not None,
                past=batch.past.between(leg.start, leg.end) if batch.past is not None else None,
            )
            for leg in segment.legs
        ]

    async def _register_adapter(self, legs: Sequence[Leg], requests: Sequence[ForwardRequest]) -> None:
        """Registers each server's part of the adapter, and puts its key into the request."""
        for leg, request in zip(legs, requests, strict=True):
            if request.adapter is not None:
                assert leg.connection is not None
                request.adapter_key = await leg.connection.register_adapter(request.adapter, request.wire_dtype)

    def _stages(self, batch: MicroBatch, legs: Sequence[Leg], messages: Sequence[Message], cost: float) -> list[Stage]:
        stages = []
        for leg, message in zip(legs, messages, strict=True):
            assert leg.connection is not None
            # For all but the last, a server's time includes the unknown time of sending to the next one.
            deadline = self.timeouts(batch, leg, cost).deadline if leg is legs[-1] else None
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

    def timeouts(self, batch: MicroBatch, leg: Leg, cost: float) -> RequestTimeouts:
        expected, is_measured = self._router.expected_seconds(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start)
        return request_timeouts(expected * cost, is_measured, self._servers.config)


def backward_cost(segment: Segment) -> float:
    """Cost in units of a forward: without its graph, the server runs the forward again first."""
    return BACKWARD_COST if segment.legs[0].graph is not None else 1.0 + BACKWARD_COST
