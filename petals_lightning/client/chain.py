"""Runs a micro-batch through a chain of servers, forward and backward, and around servers that fail.

Where servers may hand over to each other, that is tried first (`handover_chain`); what follows is the direct way. There
the client keeps what it sent into every leg until the step is done, so any leg can be run again anywhere: a server that
dies costs its own leg, not the step (`attempts`: what is tried again, and how often). A leg that is late is tried on a
second server too, answers that cannot be right count as failures, and a share of answers is audited.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N rows that are read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import TypeVar

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.audit import Auditor, Judge
from petals_lightning.client.deadlines import BACKWARD_COST, Patience, ServiceClock, patience
from petals_lightning.client.handover_chain import HandoverChain
from petals_lightning.client.hedging import race
from petals_lightning.client.legs import ChainGrads, ChainResult, Leg, MicroBatch
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import check_backward, check_forward, seconds_of
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import NonFiniteResult, PeerFailure, RetriesExhaustedError
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire

T = TypeVar("T")


class BlockChain:
    """Blocks of one model on whatever servers the view offers. All methods belong to the node's loop."""

    def __init__(self, view: SwarmView, stats: TransferStats, judge: Judge | None = None):
        self._view, self._stats = view, stats
        self._auditor = Auditor(view, stats, judge)
        self._handover = HandoverChain(view, stats)

    async def forward(self, batch: MicroBatch, end: int, *, want_prefix: bool) -> ChainResult:
        """Runs blocks [batch.start, end).

        Raises:
            RetriesExhaustedError, NoServersError, RemoteRequestError: see `errors`.
        """
        attempts = Attempts(self._view, self._stats)
        if not (legs := await self._handover.plan(batch, end)):
            return await self._forward(batch, end, want_prefix, attempts)
        return await self._handover.run(
            batch,
            legs,
            lambda: self._handover.forward(batch, legs, want_prefix),
            lambda avoid: self._forward(batch, end, want_prefix, attempts, avoid),
            attempts,
        )

    async def backward(
        self, batch: MicroBatch, result: ChainResult, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> ChainGrads:
        """Gradients of the inputs of `forward`, whose `result` must be of this batch. Raises as `forward`."""
        attempts, legs = Attempts(self._view, self._stats), list(result.legs)

        async def again(avoid: Collection[str] = ()) -> ChainGrads:
            whole = Leg(batch.start, legs[-1].end, batch.hidden, batch.prefix, batch.rows, legs[0].peer)
            rebuilt = await self._rebuild(batch, whole, attempts, avoid)
            return await self._backward(batch, rebuilt, grad, grad_prefix, attempts)

        if not result.handed_over:
            return await self._backward(batch, legs, grad, grad_prefix, attempts)
        for leg in legs:
            if leg.connection is not None and not leg.connection.is_open:  # the view was told; this step pays for it
                attempts.count(PeerFailure(leg.peer, "its stream ended between forward and backward"))
        if not self._handover.can_go_back(legs):
            return await again()
        return await self._handover.run(
            batch,
            legs,
            lambda: self._handover.backward(batch, legs, grad, grad_prefix),
            again,
            attempts,
            cost=BACKWARD_COST,
        )

    async def _backward(
        self,
        batch: MicroBatch,
        legs: list[Leg],
        grad: torch.Tensor,
        grad_prefix: torch.Tensor | None,
        attempts: Attempts,
    ) -> ChainGrads:
        deep = torch.zeros(batch.prompts.deep.shape) if batch.prompts is not None else None
        grad_hidden: torch.Tensor | None = grad
        while legs:
            leg = legs.pop()
            assert grad_hidden is not None
            input_grad = leg.start > batch.start or batch.input_grad
            sent = grad_hidden, grad_prefix
            try:
                leg, grads = await self._backward_checked(batch, leg, *sent, input_grad, attempts)
            except PeerFailure as e:
                attempts.failed(e, leg.start, leg.end)
                legs += await self._rebuild(batch, leg, attempts)
                continue
            grad_hidden, grad_prefix = grads.get("hidden"), grads.get("prefix")
            if deep is not None and batch.prompts is not None:
                deep[leg.start - batch.prompts.start : leg.end - batch.prompts.start] = grads["deep"].float()
        return ChainGrads(grad_hidden, grad_prefix, deep)

    async def _route(self, batch: MicroBatch, start: int, end: int, avoid: Collection[str]) -> list[RouteSpan]:
        """A route through blocks [start, end), without the peers to avoid if that is possible."""
        other = self._view.other_route(start, end, tokens=batch.tokens, avoid=avoid) if avoid else None
        return other or await self._view.route(start, end, tokens=batch.tokens)

    async def _forward(
        self, batch: MicroBatch, end: int, want_prefix: bool, attempts: Attempts, avoid: Collection[str] = ()
    ) -> ChainResult:
        legs: list[Leg] = []
        hidden, prefix = batch.hidden, batch.prefix
        route = await self._route(batch, batch.start, end, avoid)
        while route:
            planned = route.pop(0)
            is_last = planned.end == end
            leg = Leg(planned.start, planned.end, hidden, prefix, batch.rows if is_last else None, planned.peer_id)
            try:
                leg, tensors = await self._forward_checked(batch, leg, want_prefix or not is_last, attempts)
            except PeerFailure as e:
                attempts.failed(e, leg.start, leg.end)
                route = await self._view.route(leg.start, end, tokens=batch.tokens)
                continue
            legs.append(leg)
            hidden, prefix = tensors["hidden"], tensors.get("prefix")
        return ChainResult(hidden, prefix, legs)

    async def _forward_checked(
        self, batch: MicroBatch, leg: Leg, want_prefix: bool, attempts: Attempts
    ) -> tuple[Leg, dict[str, torch.Tensor]]:
        """One leg forward, hedged and audited; returns the leg that answered."""

        async def again(route: list[RouteSpan]) -> dict[str, torch.Tensor]:
            return (await self._run_once(replace(batch, keep=False), leg, route, want_prefix))[1]

        leg, tensors = await self._hedged(
            batch, leg, lambda tried: self._forward_leg(batch, tried, want_prefix, attempts), 1.0, attempts
        )
        await self._auditor.check(leg, self._deep(batch, leg), None, tensors, again)
        return leg, tensors

    async def _backward_checked(
        self,
        batch: MicroBatch,
        leg: Leg,
        grad: torch.Tensor,
        grad_prefix: torch.Tensor | None,
        input_grad: bool,
        attempts: Attempts,
    ) -> tuple[Leg, dict[str, torch.Tensor]]:
        """One leg backward, hedged and audited."""

        async def again(route: list[RouteSpan]) -> dict[str, torch.Tensor]:
            legs, _ = await self._run_once(batch, leg, route, grad_prefix is not None)
            hidden, prefix = grad, grad_prefix
            deep: list[torch.Tensor | None] = []
            for part in reversed(legs):
                wants = input_grad or part.start > leg.start
                grads = await self._backward_leg(batch, part, hidden, prefix, wants, Attempts(self._view, self._stats))
                hidden, prefix = grads.get("hidden", hidden), grads.get("prefix")
                deep.insert(0, grads.get("deep"))
            found = {"hidden": hidden if input_grad else None, "prefix": prefix}
            if batch.prompts is not None:
                found["deep"] = torch.cat([part for part in deep if part is not None])
            return {name: tensor for name, tensor in found.items() if tensor is not None}

        leg, grads = await self._hedged(
            batch,
            leg,
            lambda tried: self._backward_leg(batch, tried, grad, grad_prefix, input_grad, attempts),
            _backward_cost(leg),
            attempts,
        )
        await self._auditor.check(leg, self._deep(batch, leg), (grad, grad_prefix), grads, again)
        return leg, grads

    async def _run_once(
        self, batch: MicroBatch, leg: Leg, route: list[RouteSpan], want_prefix: bool
    ) -> tuple[list[Leg], dict[str, torch.Tensor]]:
        """What `leg` does, through `route`, without retries. Raises PeerFailure."""
        legs, hidden, prefix, tensors = [], leg.hidden, leg.prefix, {}
        for planned in route:
            is_last = planned.end == leg.end
            part = Leg(planned.start, planned.end, hidden, prefix, leg.rows if is_last else None, planned.peer_id)
            tensors = await self._forward_leg(
                batch, part, want_prefix or not is_last, Attempts(self._view, self._stats)
            )
            legs.append(part)
            hidden, prefix = tensors["hidden"], tensors.get("prefix")
        return legs, tensors

    async def _hedged(
        self, batch: MicroBatch, leg: Leg, run: Callable[[Leg], Awaitable[T]], cost: float, attempts: Attempts
    ) -> tuple[Leg, T]:
        """Runs a leg, and if it is late also on another server. Raises as `race`."""

        def on_failure(failure: PeerFailure) -> None:
            attempts.failed(failure, leg.start, leg.end)

        def second() -> Leg | None:
            route = self._view.other_route(leg.start, leg.end, tokens=batch.tokens, avoid=[leg.peer])
            if route is None or len(route) > 1:
                return None
            return replace(leg, peer=route[0].peer_id, connection=None, graph=None, clock=ServiceClock())

        leg.clock.restart()
        after = self._patience(leg, batch, cost).hedge
        winner, result = await race(leg, run, after=after, second=second, on_failure=on_failure)
        if winner is not leg:
            self._stats.hedges += 1
            lost = leg.clock.lost / cost
            self._view.paces.report_slow(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start, elapsed=lost)
        return winner, result

    def _patience(self, leg: Leg, batch: MicroBatch, cost: float) -> Patience:
        expected, is_measured = self._view.expected_seconds(leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start)
        return patience(expected * cost, is_measured, self._view.config)

    async def _rebuild(self, batch: MicroBatch, leg: Leg, attempts: Attempts, avoid: Collection[str] = ()) -> list[Leg]:
        """Legs that take the place of one whose server is lost.

        All but the last are run; the last runs with its backward, in one request.
        """
        *before, last = await self._route(batch, leg.start, leg.end, avoid)
        hidden, prefix, legs = leg.hidden, leg.prefix, []
        if before:
            inner = replace(batch, start=leg.start, hidden=hidden, prefix=prefix, rows=None, input_grad=True)
            run = await self._forward(inner, last.start, True, attempts, avoid)
            hidden, prefix, legs = run.hidden, run.prefix, run.legs
        return [*legs, Leg(last.start, last.end, hidden, prefix, leg.rows, last.peer_id)]

    async def _forward_leg(
        self, batch: MicroBatch, leg: Leg, want_prefix: bool, attempts: Attempts
    ) -> dict[str, torch.Tensor]:
        """One forward request; on success `leg` knows its graph. Raises PeerFailure."""
        leg.connection, lost = await self._view.connection(leg.peer), False
        while True:
            call_id = leg.connection.next_id()
            input_grad = batch.input_grad or leg.start > batch.start
            request = self._request(leg, want_prefix=want_prefix, input_grad=input_grad)
            request.keep = batch.keep
            try:
                reply = await self._send(batch, leg, request, None, call_id)
            except PeerFailure as e:
                if e.code != ErrorCode.PROMPTS_LOST.value or lost:
                    raise
                lost = True
                leg.connection.forget_prompts()
                attempts.count(e)
                continue
            try:
                check_forward(leg.peer, request, self._deep(batch, leg), reply)
            except NonFiniteResult as e:
                self._confirm(e, leg, batch, attempts)
            leg.graph = call_id if reply.fields.get("kept") is True else None
            return reply.tensors

    async def _backward_leg(
        self,
        batch: MicroBatch,
        leg: Leg,
        grad: torch.Tensor,
        grad_prefix: torch.Tensor | None,
        input_grad: bool,
        attempts: Attempts,
    ) -> dict[str, torch.Tensor]:
        """One backward request: by graph if the server has it, else with the inputs again. Raises PeerFailure."""
        if leg.connection is None or not leg.connection.is_open:
            leg.connection, leg.graph = await self._view.connection(leg.peer), None  # graphs end with their stream
        lost: set[str] = set()
        while True:
            wire = self._view.wire_dtype(leg.peer)
            again = self._request(leg, want_prefix=False, input_grad=input_grad)
            request = BackwardRequest(
                grad=to_wire(grad, wire),
                grad_prefix=to_wire(grad_prefix, wire) if grad_prefix is not None else None,
                graph=leg.graph,
                wire_dtype=wire,
                answer_bytes=again.grads_bytes,
            )
            forward = None
            if leg.graph is None:
                forward = request.forward = again
            try:
                reply = await self._send(batch, leg, forward, request, leg.connection.next_id())
            except PeerFailure as e:
                if e.code is None or e.code in lost:
                    raise
                lost.add(e.code)
                if e.code == ErrorCode.GRAPH_LOST.value:
                    leg.graph = None
                elif e.code == ErrorCode.PROMPTS_LOST.value:
                    leg.connection.forget_prompts()
                else:
                    raise
                attempts.count(e)
                continue
            grads = [tensor for tensor in (request.grad, request.grad_prefix) if tensor is not None]
            may_overflow = "float16" in (wire, self._view.compute_dtype(leg.peer))
            deep = self._deep(batch, leg)
            try:
                check_backward(leg.peer, again, deep, grads, reply, may_overflow=may_overflow)
            except NonFiniteResult as e:
                self._confirm(e, leg, batch, attempts)
            return reply.tensors

    def _confirm(self, failure: NonFiniteResult, leg: Leg, batch: MicroBatch, attempts: Attempts) -> None:
        """Returns if two servers say the same: then it is the model that overflows, and the caller shall see it.

        Raises:
            NonFiniteResult: it is the first to say so.
            RetriesExhaustedError: it says so again, and there is nobody else to ask.
        """
        for other in attempts.not_finite - {failure.peer}:
            self._view.forgive(other)
            return
        is_alone = self._view.other_route(leg.start, leg.end, tokens=batch.tokens, avoid=[leg.peer]) is None
        if failure.peer in attempts.not_finite and is_alone:
            raise RetriesExhaustedError(
                f"{failure}, twice, and nobody else holds blocks {leg.start}:{leg.end}. If the model overflows in "
                "float16, its servers should use --dtype bfloat16 or float32"
            ) from failure
        attempts.not_finite.add(failure.peer)
        raise failure

    def _deep(self, batch: MicroBatch, leg: Leg) -> torch.Tensor | None:
        return batch.prompts.between(leg.start, leg.end) if batch.prompts is not None else None

    def _request(self, leg: Leg, *, want_prefix: bool, input_grad: bool) -> ForwardRequest:
        wire = self._view.wire_dtype(leg.peer)
        return ForwardRequest(
            start=leg.start,
            end=leg.end,
            hidden=to_wire(leg.hidden, wire),
            prefix=to_wire(leg.prefix, wire, prompts=True) if leg.prefix is not None else None,
            rows=leg.rows,
            input_grad=input_grad,
            want_prefix=want_prefix and leg.prefix is not None,
            wire_dtype=wire,
        )

    async def _send(
        self,
        batch: MicroBatch,
        leg: Leg,
        forward: ForwardRequest | None,
        backward: BackwardRequest | None,
        call_id: int,
    ) -> Message:
        """Sends a forward, or a backward with or without its forward, with deep prompts unless the server has them."""
        connection = leg.connection
        assert connection is not None
        prompts_sent: asyncio.Future[None] | None = None
        if forward is not None and batch.prompts is not None:
            prompts = batch.prompts
            key, prompts_sent = await connection.prompts_key(prompts.version, leg.start, leg.end)
            forward.prompts_key = key
            if prompts_sent is not None:
                deep = self._deep(batch, leg)
                assert deep is not None
                forward.deep = to_wire(deep, forward.wire_dtype, prompts=True)
        message = backward.to_message() if backward is not None else forward.to_message()  # type: ignore[union-attr]
        deadline = self._patience(leg, batch, 1.0 if backward is None else _backward_cost(leg)).deadline
        began = time.perf_counter()
        reply = await connection.call(message, call_id, sent=prompts_sent, deadline=deadline, clock=leg.clock)
        if backward is None:  # speeds are compared between servers, so they are all taken from forwards
            compute, elapsed = seconds_of(reply, "compute"), time.perf_counter() - began - seconds_of(reply, "queue")
            self._view.paces.report_success(
                leg.peer, tokens=batch.tokens, blocks=leg.end - leg.start, compute=compute, elapsed=elapsed
            )
            if batch.leads:
                moved = message.num_elements + reply.num_elements
                travelled = elapsed - compute - self._view.round_trip(leg.peer)
                self._view.paces.report_travel(seconds=travelled, num_elements=moved)
        return reply


def _backward_cost(leg: Leg) -> float:
    """In forwards: without the graph, the server has to run the forward again first."""
    return BACKWARD_COST if leg.graph is not None else 1.0 + BACKWARD_COST
