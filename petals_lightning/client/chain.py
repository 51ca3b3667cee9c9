"""Runs a micro-batch through a chain of servers, forward and backward, and around servers that fail.

The client keeps what it sent into every leg until the step is done, so any leg can be run again anywhere: a server
that dies costs its own leg, not the step. Only failures of peers are retried, within `max_retries`; a request that a
server calls wrong surfaces at once.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, N rows that are read.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

import torch

from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import PeerFailure, RetriesExhaustedError
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire


@dataclass(frozen=True)
class StepPrompts:
    """Deep prompts of a step, the same for all its micro-batches.

    Attributes:
        deep: [L, P, H] on the CPU, for blocks [start, start + L).
        start: the first block they are for.
        version: changes when the values do; servers keep prompts by version.
    """

    deep: torch.Tensor
    start: int
    version: int


@dataclass
class MicroBatch:
    """What enters block `start`: hidden [B, S, H], prefix [P, H] or None, and rows [N] to read or None for all.

    `input_grad`: hidden needs a gradient; `keep`: a backward will follow.
    """

    start: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None
    prompts: StepPrompts | None
    input_grad: bool
    keep: bool

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass
class Leg:
    """Blocks [start, end) of one micro-batch on one server, with the inputs to run them again."""

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None
    peer: str
    connection: PeerConnection | None = None
    graph: int | None = None


@dataclass
class ChainResult:
    """Output of a micro-batch: hidden [B, S, H] or [N, H], prefix [P, H] or None, and the legs that led there."""

    hidden: torch.Tensor
    prefix: torch.Tensor | None
    legs: list[Leg]


@dataclass
class ChainGrads:
    """Gradients of a micro-batch: hidden [B, S, H] or None, prefix [P, H] or None, deep [L, P, H] or None."""

    hidden: torch.Tensor | None
    prefix: torch.Tensor | None
    deep: torch.Tensor | None


@dataclass
class Attempts:
    """Counts failures of one micro-batch in one direction, or of one step of a session."""

    limit: int
    stats: TransferStats
    failures: list[str] = field(default_factory=list)

    def count(self, failure: PeerFailure) -> None:
        self.failures.append(str(failure))
        self.stats.retries += 1
        if len(self.failures) > self.limit:
            raise RetriesExhaustedError(
                f"a part of the step failed {len(self.failures)} times (max_retries={self.limit}); "
                f"last: {'; '.join(self.failures[-3:])}"
            ) from failure


class BlockChain:
    """Blocks of one model on whatever servers the view offers. All methods belong to the node's loop."""

    def __init__(self, view: SwarmView, stats: TransferStats):
        self._view, self._stats = view, stats

    async def forward(self, batch: MicroBatch, end: int, *, want_prefix: bool) -> ChainResult:
        """Runs blocks [batch.start, end).

        Raises:
            RetriesExhaustedError, NoServersError, RemoteRequestError: see `errors`.
        """
        attempts = Attempts(self._view.config.max_retries, self._stats)
        return await self._forward(batch, end, want_prefix, attempts)

    async def backward(
        self, batch: MicroBatch, result: ChainResult, grad: torch.Tensor, grad_prefix: torch.Tensor | None
    ) -> ChainGrads:
        """Gradients of the inputs of `forward`, whose `result` must be of this batch. Raises as `forward`."""
        attempts = Attempts(self._view.config.max_retries, self._stats)
        deep = torch.zeros(batch.prompts.deep.shape) if batch.prompts is not None else None
        legs = list(result.legs)
        grad_hidden: torch.Tensor | None = grad
        while legs:
            leg = legs.pop()
            assert grad_hidden is not None
            input_grad = leg.start > batch.start or batch.input_grad
            try:
                grads = await self._backward_leg(batch, leg, grad_hidden, grad_prefix, input_grad, attempts)
            except PeerFailure as e:
                self._view.report_failure(e)
                attempts.count(e)
                legs += await self._rebuild(batch, leg, attempts)
                continue
            grad_hidden, grad_prefix = grads.get("hidden"), grads.get("prefix")
            if deep is not None and batch.prompts is not None:
                deep[leg.start - batch.prompts.start : leg.end - batch.prompts.start] = grads["deep"].float()
        return ChainGrads(grad_hidden, grad_prefix, deep)

    async def _forward(self, batch: MicroBatch, end: int, want_prefix: bool, attempts: Attempts) -> ChainResult:
        legs: list[Leg] = []
        hidden, prefix = batch.hidden, batch.prefix
        route = await self._view.route(batch.start, end, tokens=batch.tokens)
        while route:
            planned = route.pop(0)
            is_last = planned.end == end
            leg = Leg(planned.start, planned.end, hidden, prefix, batch.rows if is_last else None, planned.peer_id)
            try:
                reply = await self._forward_leg(batch, leg, want_prefix or not is_last, attempts)
            except PeerFailure as e:
                self._view.report_failure(e)
                attempts.count(e)
                route = await self._view.route(leg.start, end, tokens=batch.tokens)
                continue
            legs.append(leg)
            hidden, prefix = reply.tensors["hidden"], reply.tensors.get("prefix")
        return ChainResult(hidden, prefix, legs)

    async def _rebuild(self, batch: MicroBatch, leg: Leg, attempts: Attempts) -> list[Leg]:
        """Legs that take the place of one whose server is lost.

        All but the last are run; the last runs with its backward, in one request.
        """
        *before, last = await self._view.route(leg.start, leg.end, tokens=batch.tokens)
        hidden, prefix, legs = leg.hidden, leg.prefix, []
        if before:
            inner = replace(batch, start=leg.start, hidden=hidden, prefix=prefix, rows=None, input_grad=True)
            run = await self._forward(inner, last.start, True, attempts)
            hidden, prefix, legs = run.hidden, run.prefix, run.legs
        return [*legs, Leg(last.start, last.end, hidden, prefix, leg.rows, last.peer_id)]

    async def _forward_leg(self, batch: MicroBatch, leg: Leg, want_prefix: bool, attempts: Attempts) -> Message:
        """One forward request; on success `leg` knows its graph. Raises PeerFailure."""
        leg.connection = await self._view.connection(leg.peer)
        while True:
            call_id = leg.connection.next_id()
            input_grad = batch.input_grad or leg.start > batch.start
            request = self._request(leg, want_prefix=want_prefix, input_grad=input_grad)
            request.keep = batch.keep
            try:
                reply = await self._send(batch, leg, request, None, call_id)
            except PeerFailure as e:
                if e.code != ErrorCode.PROMPTS_LOST.value:
                    raise
                leg.connection.forget_prompts()
                attempts.count(e)
                continue
            _check_reply(leg, reply, request)
            leg.graph = call_id if reply.fields.get("kept") else None
            return reply

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
        while True:
            wire = self._view.wire_dtype(leg.peer)
            request = BackwardRequest(
                grad=to_wire(grad, wire),
                grad_prefix=to_wire(grad_prefix, wire) if grad_prefix is not None else None,
                graph=leg.graph,
                wire_dtype=wire,
            )
            forward = None
            if leg.graph is None:
                forward = request.forward = self._request(leg, want_prefix=False, input_grad=input_grad)
            try:
                reply = await self._send(batch, leg, forward, request, leg.connection.next_id())
            except PeerFailure as e:
                if e.code == ErrorCode.GRAPH_LOST.value:
                    leg.graph = None
                elif e.code == ErrorCode.PROMPTS_LOST.value:
                    leg.connection.forget_prompts()
                else:
                    raise
                attempts.count(e)
                continue
            _check_grads(batch, leg, reply, input_grad)
            return reply.tensors

    def _request(self, leg: Leg, *, want_prefix: bool, input_grad: bool) -> ForwardRequest:
        wire = self._view.wire_dtype(leg.peer)
        return ForwardRequest(
            start=leg.start,
            end=leg.end,
            hidden=to_wire(leg.hidden, wire),
            prefix=to_wire(leg.prefix, wire) if leg.prefix is not None else None,
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
                deep = prompts.deep[leg.start - prompts.start : leg.end - prompts.start]
                forward.deep = to_wire(deep, forward.wire_dtype)
        message = backward.to_message() if backward is not None else forward.to_message()  # type: ignore[union-attr]
        began = time.perf_counter()
        reply = await connection.call(message, call_id, sent=prompts_sent)
        if backward is None:  # speeds are compared between servers, so they are all taken from forwards
            compute, queue = (_seconds(leg, reply, name) for name in ("compute", "queue"))
            self._view.report_success(
                leg.peer,
                tokens=batch.tokens,
                blocks=leg.end - leg.start,
                compute=compute,
                elapsed=time.perf_counter() - began - queue,
            )
        return reply


def _check_reply(leg: Leg, reply: Message, request: ForwardRequest) -> None:
    """An answer of the wrong shape is the server's failure, not the user's."""
    shape = list(request.hidden.shape) if request.rows is None else [len(request.rows), request.hidden.shape[2]]
    hidden, prefix = reply.tensors.get("hidden"), reply.tensors.get("prefix")
    if hidden is None or list(hidden.shape) != shape:
        raise PeerFailure(leg.peer, f"answered {list(hidden.shape) if hidden is not None else 'nothing'} for {shape}")
    if request.want_prefix and (prefix is None or request.prefix is None or prefix.shape != request.prefix.shape):
        raise PeerFailure(leg.peer, "answered without the prefix it was asked for")


def _check_grads(batch: MicroBatch, leg: Leg, reply: Message, input_grad: bool) -> None:
    """As `_check_reply`, for gradients."""
    expected = {"hidden": leg.hidden.shape} if input_grad else {}
    if leg.prefix is not None:
        expected["prefix"] = leg.prefix.shape
        if batch.prompts is not None:
            expected["deep"] = torch.Size([leg.end - leg.start, *leg.prefix.shape])
    for name, shape in expected.items():
        grad = reply.tensors.get(name)
        if grad is None or grad.shape != shape or not grad.is_floating_point():
            got = list(grad.shape) if grad is not None else "nothing"
            raise PeerFailure(leg.peer, f"answered {got} for the gradient {list(shape)} of {name}")


def _seconds(leg: Leg, reply: Message, name: str) -> float:
    value = reply.fields.get(name)
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise PeerFailure(leg.peer, f"answered {value!r:.40} for its {name} time")
    return float(value)
