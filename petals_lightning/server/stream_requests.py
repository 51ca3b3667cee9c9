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
from petals_lightning.heap import trim_heap
from petals_lightning.protocol.adapters import Adapter
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

_MAX_ADAPTERS = 8  # that one stream may register; a client needs one or two at a time
_SHARE = 4  # older adapters are dropped beyond this part of what a client may take
_TRIM_BYTES = 4 << 20  # of dropped adapters, after which the heap is trimmed
_ADAPTER_TIMEOUT = 10.0  # seconds that a handed-over request waits for its adapter, which the client itself sends

Handler = Callable[[], Coroutine[Any, Any, Message]]
"""Runs a request that was admitted, and returns its answer."""


class RegisteredAdapters:
    """Adapters that a client keeps on the server for later requests, at its own expense.

    Args:
        resources: of the server.
        reserve: counts bytes on the client's share; returns the reason if they do not fit.
        release: gives bytes back.
    """

    def __init__(
        self, resources: ServerResources, reserve: Callable[[int], str | None], release: Callable[[int], None]
    ):
        self._resources, self._reserve, self._release = resources, reserve, release
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()
        self._registered = asyncio.Event()
        self._full: str | None = None  # why the newest adapter was not kept

    def __contains__(self, key: int) -> bool:
        return key in self._adapters

    def get(self, key: int) -> Adapter:
        """The adapter under a key. Raises Refusal if there is none."""
        if key not in self._adapters:
            if self._full is not None:
                raise Refusal(ErrorCode.OVERLOADED, f"no room for the adapter: {self._full}")
            raise Refusal(ErrorCode.ADAPTER_LOST, "this adapter is not registered here any more")
        return self._adapters[key]

    def register(self, key: int, adapter: Adapter) -> None:
        """Keeps an adapter under a key; drops the oldest if there are too many, or they take too much.

        If there is no memory for it, the requests that name it are refused with the reason.

        Raises:
            ProtocolError: no request of this server could use it, or it names an adapter that is not held.
        """
        resources = self._resources
        resources.span.check_adapter(adapter)
        most = resources.limits.max_batch_tokens
        if adapter.deep is not None and adapter.deep.shape[1] >= most:
            raise ProtocolError(f"deep prompts are {list(adapter.deep.shape)}, must be of fewer than {most} positions")
        if adapter.past_length >= most:
            raise ProtocolError(f"keys and values of {adapter.past_length} positions, must be fewer than {most}")
        before, share = self._num_bytes, resources.limits.max_client_bytes // _SHARE - adapter.num_bytes
        self._forget(key)
        while self._adapters and (len(self._adapters) >= _MAX_ADAPTERS or self._num_bytes > share):
            self._forget(next(iter(self._adapters)))
        if before - self._num_bytes >= _TRIM_BYTES:  # no request need follow, after which the heap would be trimmed
            trim_heap()
        if (reason := self._reserve(adapter.num_bytes)) is not None:
            self.refuse(reason)
            return
        self._full = None
        own = adapter.map(torch.clone)  # views would keep the whole message in memory
        try:
            self._adapters[key] = resources.with_held(own)
        except Refusal as e:  # `info` has said what is held
            raise ProtocolError(str(e)) from e
        self._registered.set()

    def refuse(self, reason: str) -> None:
        """Notes why an adapter was not kept, for the requests that name it."""
        self._full = reason

    async def wait_for(self, key: int) -> None:
        """Returns when an adapter is registered under a key, or after `_ADAPTER_TIMEOUT`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ADAPTER_TIMEOUT):
                while key not in self._adapters:
                    self._registered.clear()
                    await self._registered.wait()

    def clear(self) -> None:
        """Frees the tensors. Their bytes are released with the stream's others."""
        self._adapters.clear()

    @property
    def _num_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._adapters.values())

    def _forget(self, key: int) -> None:
        if (adapter := self._adapters.pop(key, None)) is not None:
            self._release(adapter.num_bytes)


class StreamRequests:
    """Runs the requests of one stream.

    Args:
        resources: of the server.
        peer: the client's base58 id.
        number: of the stream; names its graphs and sessions.
        adapters: registered on the stream.
    """

    def __init__(self, resources: ServerResources, peer: str, number: int, adapters: RegisteredAdapters):
        self._resources, self._peer, self._number, self._adapters = resources, peer, number, adapters
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
            if handed_over and forward.adapter_key is not None and forward.adapter_key not in self._adapters:
                return lambda: self._forward_after_adapter(call_id, forward)
            self._admit_forward(forward)
            return lambda: self._forward(call_id, forward)
        if message.method is Method.STEP:
            step = StepRequest.from_message(message.fields, message.tensors)
            self._resources.check_size(step.start, step.end, step.hidden, step.prefix)
            self._fill_in_adapter(step)
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
        """Checks a forward, and fills in its registered adapter."""
        self._resources.check_size(request.start, request.end, request.hidden, request.prefix)
        self._fill_in_adapter(request)

    def _fill_in_adapter(self, request: ForwardRequest | StepRequest) -> None:
        if request.adapter_key is not None:
            adapter = self._adapters.get(request.adapter_key)
            adapter.check_fits(request.start, request.end, request.prefix)
            request.adapter = adapter

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

    async def _forward_after_adapter(self, call_id: int, request: ForwardRequest) -> Message:
        """Runs a handed-over forward that arrived before its adapter, which the client itself sends."""
        assert request.adapter_key is not None
        await self._adapters.wait_for(request.adapter_key)
        self._admit_forward(request)
        return await self._forward(call_id, request)

    async def _forward(self, call_id: int, request: ForwardRequest) -> Message:
        resources = self._resources
        size = resources.graph_size(request)
        keeps_graph = request.keep and resources.graphs.make_room(size)

        def compute() -> tuple[SpanGraph | None, dict[str, torch.Tensor]]:
            past: dict[str, torch.Tensor] = {}
            if keeps_graph:
                graph = self._run_with_graph(request)
                graph.num_bytes = size
                outputs = graph.outputs
            else:
                graph, inputs = None, _span_inputs(request)
                with torch.no_grad():
                    out, prefix = resources.span.forward(inputs)
                    if request.want_past:
                        past = resources.span.prefix_past(inputs)
                outputs = [out] if prefix is None else [out, prefix]
            named = {"hidden": outputs[0], **past}
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
    return SpanInputs(request.start, request.end, request.hidden, request.prefix, request.adapter, rows)


def _check_grads(request: BackwardRequest, inputs: SpanInputs) -> None:
    expected = list(inputs.hidden.shape) if inputs.rows is None else [len(inputs.rows), inputs.hidden.shape[2]]
    if list(request.grad.shape) != expected:
        raise Refusal(ErrorCode.BAD_REQUEST, f"grad is {list(request.grad.shape)}, must be {expected}")
    if request.grad_prefix is not None and (inputs.prefix is None or request.grad_prefix.shape != inputs.prefix.shape):
        raise Refusal(ErrorCode.BAD_REQUEST, "grad_prefix does not fit the forward's prefix")
