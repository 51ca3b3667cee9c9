"""The requests of one client's stream: parses, admits and runs them. Reads and writes no stream."""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import ErrorCode, Message, Method
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import INT8_BLOCKWISE
from petals_lightning.server.blocks.span import PrefixRun, SpanGraph, SpanInputs
from petals_lightning.server.execution.compute import ComputeResult, Priority
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.sessions.batched_decoding import DecodeStep
from petals_lightning.server.sessions.session_cache import SessionCache

_MAX_PROMPTS = 8  # sets of deep prompts that one stream may register; a client needs one or two at a time
_PROMPTS_TIMEOUT = 10.0  # seconds that a handed-over request waits for prompts, which the client itself sends

Handler = Callable[[], Coroutine[Any, Any, Message]]
"""Runs a request that was admitted, and returns its answer."""


class RegisteredPrompts:
    """Deep prompts that a client keeps on the server for later requests, at its own expense.

    Args:
        resources: of the server.
        reserve: counts bytes on the client's share; returns the reason if they do not fit.
        release: gives bytes back.
    """

    def __init__(
        self, resources: ServerResources, reserve: Callable[[int], str | None], release: Callable[[int], None]
    ):
        self._resources, self._reserve, self._release = resources, reserve, release
        self._prompts: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._registered = asyncio.Event()
        self._full: str | None = None  # why the newest prompts were not kept

    def __contains__(self, key: int) -> bool:
        return key in self._prompts

    def get(self, key: int) -> torch.Tensor:
        """Prompts [n, P, H]. Raises Refusal if there are none under the key."""
        if key not in self._prompts:
            if self._full is not None:
                raise Refusal(ErrorCode.OVERLOADED, f"no room for prompts: {self._full}")
            raise Refusal(ErrorCode.PROMPTS_LOST, "these prompts are not registered here any more")
        return self._prompts[key]

    def register(self, key: int, deep: torch.Tensor | None) -> None:
        """Keeps prompts [n, P, H] under a key; drops the oldest set if there are too many.

        If there is no memory for them, the requests that name them are refused with the reason.

        Raises:
            ProtocolError: no request of this server could use them.
        """
        span, most = self._resources.span, self._resources.limits.max_batch_tokens
        if deep is None:
            raise ProtocolError("the tensor `deep` is missing")
        blocks, length, size = deep.shape
        if not 1 <= blocks <= span.end - span.start or size != span.hidden_size or not 1 <= length < most:
            raise ProtocolError(
                f"prompts are {list(deep.shape)}, must be of up to {span.end - span.start} blocks and fewer than "
                f"{most} positions, of hidden size {span.hidden_size}"
            )
        self._forget(key)
        while len(self._prompts) >= _MAX_PROMPTS:
            self._forget(next(iter(self._prompts)))
        if (reason := self._reserve(deep.nbytes)) is not None:
            self.refuse(reason)
            return
        self._full = None
        self._prompts[key] = deep.clone()  # a view would keep the whole message in memory
        self._registered.set()

    def refuse(self, reason: str) -> None:
        """Notes why prompts were not kept, for the requests that name them."""
        self._full = reason

    async def wait_for(self, key: int) -> None:
        """Returns when prompts are registered under a key, or after `_PROMPTS_TIMEOUT`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PROMPTS_TIMEOUT):
                while key not in self._prompts:
                    self._registered.clear()
                    await self._registered.wait()

    def clear(self) -> None:
        """Frees the tensors. Their bytes are released with the stream's others."""
        self._prompts.clear()

    def _forget(self, key: int) -> None:
        if (deep := self._prompts.pop(key, None)) is not None:
            self._release(deep.nbytes)


class StreamRequests:
    """Runs the requests of one stream.

    Args:
        resources: of the server.
        peer: the client's base58 id.
        number: of the stream; names its graphs and sessions.
        prompts: registered on the stream.
    """

    def __init__(self, resources: ServerResources, peer: str, number: int, prompts: RegisteredPrompts):
        self._resources, self._peer, self._number, self._prompts = resources, peer, number, prompts
        self._prefix_run: weakref.ref[PrefixRun] | None = None

    def admit(self, call_id: int, message: Message, *, is_last: bool, handed_over: bool) -> Handler:
        """Parses and checks a request.

        Args:
            call_id: of the request.
            message: a forward, backward or step.
            is_last: no other server follows on the request's route.
            handed_over: another server sent it, so the client's own messages may arrive later.

        Raises:
            Refusal, ProtocolError: the server does not run it.
        """
        if message.method is Method.FORWARD:
            forward = ForwardRequest.from_message(message.fields, message.tensors)
            if not is_last:
                forward.rows = None  # only the last server selects positions
            if handed_over and forward.prompts_key is not None and forward.prompts_key not in self._prompts:
                return lambda: self._forward_after_prompts(call_id, forward)
            self._admit_forward(forward)
            return lambda: self._forward(call_id, forward)
        if message.method is Method.STEP:
            step = StepRequest.from_message(message.fields, message.tensors)
            self._resources.check_size(step.start, step.end, step.hidden, step.prefix)
            cache = self._session_cache(call_id, step)
            return lambda: self._step(call_id, step, cache)
        backward = BackwardRequest.from_message(message.fields, message.tensors)
        if backward.forward is not None:
            self._admit_forward(backward.forward)
        return lambda: self._backward(call_id, backward)

    def free(self) -> None:
        """Frees the graphs and sessions of the stream, which has ended."""
        self._resources.graphs.drop_stream(self._number)
        self._resources.caches.drop_stream(self._number)

    def _admit_forward(self, request: ForwardRequest) -> None:
        """Checks a forward, and fills in its registered prompts."""
        self._resources.check_size(request.start, request.end, request.hidden, request.prefix)
        if request.prompts_key is not None:
            deep = self._prompts.get(request.prompts_key)
            assert request.prefix is not None  # `from_message` has checked it
            if list(deep.shape) != [request.end - request.start, *request.prefix.shape]:
                raise ProtocolError(f"registered prompts {list(deep.shape)} do not fit the request")
            request.deep = deep

    def _session_cache(self, call_id: int, request: StepRequest) -> SessionCache:
        """The cache that a step continues; opens it if the step asks for that."""
        key = (self._number, request.session)
        if request.max_length is not None:
            self._resources.open_cache(key, request, self._peer)
        cache = self._resources.caches.get(key)
        if cache is None:
            raise Refusal(ErrorCode.CACHE_LOST, "this session is not held here any more")
        cache.check(request)
        if call_id <= cache.last_call:  # the client gave it up, and it arrives late through other servers
            raise ProtocolError("a newer step of this session was here before this one")
        cache.last_call = call_id
        return cache

    async def _forward_after_prompts(self, call_id: int, request: ForwardRequest) -> Message:
        """Runs a handed-over forward that arrived before its prompts, which the client itself sends."""
        assert request.prompts_key is not None
        await self._prompts.wait_for(request.prompts_key)
        self._admit_forward(request)
        return await self._forward(call_id, request)

    async def _forward(self, call_id: int, request: ForwardRequest) -> Message:
        resources = self._resources
        size = resources.graph_size(request)
        keeps_graph = request.keep and resources.graphs.make_room(size)

        def compute() -> tuple[SpanGraph | None, dict[str, torch.Tensor]]:
            if keeps_graph:
                graph = self._run_with_graph(request)
                graph.num_bytes = size
                outputs = graph.outputs
            else:
                graph = None
                with torch.no_grad():
                    out, prefix = resources.span.forward(_span_inputs(request))
                outputs = [out] if prefix is None else [out, prefix]
            named = {"hidden": outputs[0]}
            if request.want_prefix and len(outputs) > 1:
                named["prefix"] = outputs[1]
            return graph, resources.span.transfers.outputs_to_wire(named, request.wire_dtype)

        result = await resources.compute.run(Priority.FORWARD, compute, client=self._peer, key=(self._number, call_id))
        graph, tensors = result.value
        if graph is not None:
            resources.graphs.put((self._number, call_id), graph, self._peer)
        return _answer(result, tensors, request.wire_dtype, kept=graph is not None)

    async def _step(self, call_id: int, request: StepRequest, cache: SessionCache) -> Message:
        is_alone = self._resources.caches.is_alone((self._number, request.session))
        step = DecodeStep(self._resources.span, cache, request, is_alone=is_alone)
        key = (self._number, call_id)
        result = await self._resources.compute.run(step.priority, step, client=self._peer, key=key)
        return _answer(result, result.value, request.wire_dtype)

    async def _backward(self, call_id: int, request: BackwardRequest) -> Message:
        span, graph = self._resources.span, None
        if request.graph is not None:
            graph = self._resources.graphs.pop((self._number, request.graph))
            if graph is None:
                raise Refusal(ErrorCode.GRAPH_LOST, "the kept graph is gone")
            _check_grads(request, graph.inputs)

        def compute() -> dict[str, torch.Tensor]:
            kept = graph
            if kept is None:
                assert request.forward is not None
                inputs = _span_inputs(request.forward)
                _check_grads(request, inputs)
                kept = span.forward_with_graph(inputs, input_grad=request.forward.input_grad)
            grads = span.backward(kept, request.grad, request.grad_prefix)
            return {name: span.transfers.to_wire(grad, request.wire_dtype) for name, grad in grads.items()}

        key = (self._number, call_id)
        result = await self._resources.compute.run(Priority.BACKWARD, compute, client=self._peer, key=key)
        return _answer(result, result.value, request.wire_dtype)

    def _run_with_graph(self, request: ForwardRequest) -> SpanGraph:
        """Runs on the compute thread. Shares the prefix's pass of an earlier micro-batch while its graph is kept."""
        earlier = self._prefix_run() if self._prefix_run is not None else None
        graph = self._resources.span.forward_with_graph(
            _span_inputs(request), input_grad=request.input_grad, prefix_run=earlier
        )
        self._prefix_run = weakref.ref(graph.prefix_run) if graph.prefix_run is not None else None
        return graph


def _answer(result: ComputeResult[Any], tensors: dict[str, torch.Tensor], wire_dtype: str, **fields: bool) -> Message:
    fields_with_times = {**fields, "queue": result.queued, "compute": result.computed}
    return Message(Method.OK, fields_with_times, tensors, int8_blockwise=wire_dtype == INT8_BLOCKWISE)


def _span_inputs(request: ForwardRequest) -> SpanInputs:
    rows = request.rows.long() if request.rows is not None else None
    return SpanInputs(request.start, request.end, request.hidden, request.prefix, request.deep, rows)


def _check_grads(request: BackwardRequest, inputs: SpanInputs) -> None:
    expected = list(inputs.hidden.shape) if inputs.rows is None else [len(inputs.rows), inputs.hidden.shape[2]]
    if list(request.grad.shape) != expected:
        raise Refusal(ErrorCode.BAD_REQUEST, f"grad is {list(request.grad.shape)}, must be {expected}")
    if request.grad_prefix is not None and (inputs.prefix is None or request.grad_prefix.shape != inputs.prefix.shape):
        raise Refusal(ErrorCode.BAD_REQUEST, "grad_prefix does not fit the forward's prefix")
