"""One client's stream: reads its messages, has them computed, answers.

Another server's stream is read here too: what it hands over goes to the session of the client that permits it, and is
that client's request from its first byte.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import floating, typed
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.handover import (
    Envelope,
    Hop,
    UsedCalls,
    carried_tensors,
    new_stream_key,
    read_route,
    split_reply,
)
from petals_lightning.protocol.messages import CHUNK_BYTES, ErrorCode, Message, Method
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import INT8_BLOCKWISE
from petals_lightning.server.access.quotas import Account
from petals_lightning.server.access.rules import Gate
from petals_lightning.server.blocks.span import PrefixRun, SpanGraph, SpanInputs
from petals_lightning.server.execution.compute import Priority
from petals_lightning.server.execution.malloc_trim import give_back
from petals_lightning.server.resources import Backend, Refusal, stream_numbers
from petals_lightning.server.sessions.batched_decoding import SessionStep
from petals_lightning.server.sessions.session_cache import SessionCache

logger = logging.getLogger(__name__)

_MAX_PROMPTS = 8  # sets of deep prompts that one stream may have registered; a client needs one or two at a time
_PROMPTS_PATIENCE = 10.0  # seconds that a request handed over waits for prompts that come from the client itself
_MAX_FAREWELL = 2.0  # seconds that a client may take to read why its stream is refused
_WORTH_TRIMMING = 4 << 20  # bytes that a stream must have held for the heap to be trimmed when it ends

Handler = Callable[[], Coroutine[Any, Any, Message]]


class Session:
    """Serves one stream until it ends; what the client left on the server is freed then."""

    def __init__(self, backend: Backend, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._backend, self._peer = backend, peer
        self._number = next(stream_numbers)
        limits = backend.limits
        self._gate = Gate(backend.rules, peer, backend.peer_id)
        self._account, self._reserved = Account(), 0
        self._key, self._has_ended = new_stream_key(), False
        self._prefix_run: weakref.ref[PrefixRun] | None = None
        self._reader = MessageReader(
            reader,
            max_message_bytes=limits.max_message_bytes,
            max_open=limits.max_open_requests,
            reserve=self._reserve,
            release=self._release_partial,
        )
        self._stream, self._writer = reader, MessageWriter(writer)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sizes: dict[asyncio.Task[None], int] = {}
        self._prompts: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._prompts_came = asyncio.Event()
        self._used_calls = UsedCalls()  # handed over, or given up while they may be on their way through other servers

    async def serve(self) -> None:
        account = self._backend.accounts.open_stream(self._peer)
        if isinstance(account, str):
            await self._refuse_stream(ErrorCode.OVERLOADED, account)
            self._writer.close()
            return
        self._account = account
        self._backend.sessions[self._number] = self
        try:
            while await self._read_one():
                pass
        except ProtocolError as e:
            logger.warning("client …%s breaks the protocol: %s", self._peer[-6:], e)
            await self._refuse_stream(ErrorCode.BAD_REQUEST, str(e))
        finally:
            del self._backend.sessions[self._number]
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            self._backend.graphs.drop_stream(self._number)
            self._backend.caches.drop_stream(self._number)
            self._writer.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._reader.abandon()
            self._prompts.clear()  # now: this object is part of cycles, which may live on for long
            if self._reserved >= _WORTH_TRIMMING:
                give_back()
            self._release(self._reserved)  # also of a message that broke the protocol
            self._has_ended = True
            self._backend.accounts.close_stream(self._peer)

    async def _read_one(self) -> bool:
        """Serves a message, which must not live on here while the next one is waited for; False at the stream's end."""
        if (item := await self._reader.next()) is None:
            return False
        await self._dispatch(item[0], item[1])
        return True

    async def _refuse_stream(self, code: ErrorCode, reason: str) -> None:
        """Tells the client why its stream ends, and waits for it to close its end.

        What it sends meanwhile is read and thrown away: a stream closed over unread bytes is reset by libp2p, and the
        reason on its way is lost.
        """
        await self._reply(0, Message(Method.ERROR, {"code": code.value, "message": reason}))
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_MAX_FAREWELL):
                while await self._stream.read(CHUNK_BYTES):
                    pass

    async def _dispatch(self, call_id: int, message: Message) -> None:
        if message.method is Method.AUTH:
            await self._reply(call_id, self._gate.answer(message.fields))
            self._release(message.reserved)
            return
        if message.method is Method.HANDOVER:  # the client's permit stands for this server's own rules
            await self._reply(call_id, self._take_over(message))
            return
        if not self._gate.is_open:
            refusal = self._gate.refusal()
            if message.method is Method.INFO:  # a server that will hand over here must know this much
                refusal.fields["max_message_bytes"] = self._backend.limits.max_message_bytes
            await self._reply(call_id, refusal)
            return
        match message.method:
            case Method.PING:
                await self._reply(call_id, Message(Method.OK, {"calls": self._standings()}))
            case Method.INFO:
                own = {"stream": self._number, "stream_key": self._key}
                await self._reply(call_id, Message(Method.OK, self._backend.info | own))
            case Method.CANCEL:
                if (task := self._tasks.get(call_id)) is not None:
                    task.cancel()
                    self._settle(call_id, task)  # now: the next request may be read before the task can end
                else:
                    self._used_calls.add(call_id)
            case Method.END_SESSION:
                self._backend.caches.pop((self._number, typed(message.fields, "session", int)))
            case Method.PROMPTS:
                if not message.dropped:  # else those who wait for them will say that they are lost
                    with suppress(Refusal):  # likewise
                        self._register(typed(message.fields, "key", int), floating(message.tensors, "deep", 3))
            case Method.FORWARD | Method.BACKWARD | Method.STEP:
                self._begin(call_id, message)
                return
            case _:
                raise ProtocolError(f"a client may not send {message.method.value!r}")
        self._release(message.reserved)

    def _begin(self, call_id: int, message: Message, *, handed_over: bool = False) -> None:
        if call_id in self._tasks:
            raise ProtocolError(f"call id {call_id} is used twice")
        # Parsed here and not in the task: registered prompts must be seen in the order they were sent.
        handler = self._prepare(call_id, message, handed_over)
        self._account.requests += 1
        task = asyncio.create_task(self._answer(call_id, handler))
        self._tasks[call_id] = task
        self._sizes[task] = message.reserved
        task.add_done_callback(lambda done: self._settle(call_id, done))

    def _take_over(self, message: Message) -> Message:
        """Begins a request that the server at the other end hands over for one of our clients; says whether."""
        envelope = Envelope.from_fields(message.fields)
        client = self._payer(Method.HANDOVER, message.fields)
        if client is None:
            words = "no client's stream here permits this (or it has ended)"
        elif envelope.call in client._tasks or not client._used_calls.add(envelope.call):
            client._release(message.reserved)
            words = f"call {envelope.call} was handed over before, or given up by its client: a permit is good once"
        else:
            client._begin(envelope.call, envelope.open(message), handed_over=True)
            return Message(Method.OK)
        return Message(Method.ERROR, {"code": ErrorCode.NOT_ALLOWED.value, "message": words})

    def _payer(self, method: Method, fields: dict[str, Any]) -> Session | None:
        """Whose share a message of this stream counts on: the client's that has it handed over; None: nobody's."""
        if method is not Method.HANDOVER:
            return self if self._gate.is_open else None
        envelope = Envelope.from_fields(fields)
        client = self._backend.sessions.get(envelope.stream)
        return client if client is not None and envelope.is_permitted(client._key, self._peer) else None

    def _settle(self, call_id: int, task: asyncio.Task[None]) -> None:
        """A request is answered or given up: what it was charged with is given back, once."""
        if (num_bytes := self._sizes.pop(task, None)) is not None:
            del self._tasks[call_id]
            self._account.requests -= 1
            self._release(num_bytes)

    def _reserve(self, num_bytes: int, call_id: int, method: Method, fields: dict[str, Any]) -> str | None:
        payer = self._payer(method, fields)
        return payer._charge(num_bytes) if payer is not None else "nobody pays for this"

    def _charge(self, num_bytes: int) -> str | None:
        """Counts bytes on this client's share; says why not if there is no room."""
        if self._has_ended:
            return "the client's stream has ended"
        if (refusal := self._backend.accounts.reserve(self._account, num_bytes)) is None:
            self._reserved += num_bytes
        return refusal

    def _release_partial(self, num_bytes: int, method: Method, fields: dict[str, Any]) -> None:
        if (payer := self._payer(method, fields)) is not None:  # else it has ended, and all was given back then
            payer._release(num_bytes)

    def _release(self, num_bytes: int) -> None:
        if self._has_ended:
            return
        self._reserved -= num_bytes
        self._backend.accounts.release(self._account, num_bytes)

    def _standings(self) -> list[list[int]]:
        """For each open call, about how many requests run before it."""
        return [[call_id, self._backend.compute.ahead((self._number, call_id))] for call_id in self._tasks]

    def _prepare(self, call_id: int, message: Message, handed_over: bool) -> Handler:
        try:
            limits = self._backend.limits
            if self._backend.leaving:
                raise Refusal(ErrorCode.LEAVING, "the server is shutting down")
            if self._account.requests >= limits.max_open_requests:
                words = f"this client has {limits.max_open_requests} requests open, which is the limit"
                raise Refusal(ErrorCode.OVERLOADED, words)
            if message.dropped:
                raise Refusal(ErrorCode.OVERLOADED, f"no room: {message.dropped}")
            route = read_route(message.fields)
            handler = self._handler(call_id, message, is_last=not route, handed_over=handed_over)
        except ProtocolError as e:
            return _failing(Refusal(ErrorCode.BAD_REQUEST, str(e)))
        except Refusal as e:
            return _failing(e)
        return (lambda: self._hand_over(handler, message, route)) if route else handler

    def _handler(self, call_id: int, message: Message, *, is_last: bool, handed_over: bool) -> Handler:
        """Parses and admits a request; what it gives runs it."""
        if message.method is Method.FORWARD:
            forward = ForwardRequest.from_message(message.fields, message.tensors)
            if not is_last:
                forward.rows = None  # they are the last server's
            if handed_over and forward.prompts_key is not None and forward.prompts_key not in self._prompts:
                return lambda: self._forward_with_prompts(call_id, forward)
            self._admit(forward)
            return lambda: self._forward(call_id, forward)
        if message.method is Method.STEP:
            step = StepRequest.from_message(message.fields, message.tensors)
            self._backend.check_size(step.start, step.end, step.hidden, step.prefix)
            cache = self._session_cache(call_id, step)
            return lambda: self._step(call_id, step, cache)
        backward = BackwardRequest.from_message(message.fields, message.tensors)
        if backward.forward is not None:
            self._admit(backward.forward)
        return lambda: self._backward(call_id, backward)

    def _admit(self, request: ForwardRequest) -> None:
        """Checks a request, and resolves its registered prompts."""
        self._backend.check_size(request.start, request.end, request.hidden, request.prefix)
        if request.prompts_key is not None:
            if request.deep is not None:
                self._register(request.prompts_key, request.deep)
            elif (deep := self._prompts.get(request.prompts_key)) is not None:
                assert request.prefix is not None
                if list(deep.shape) != [request.end - request.start, *request.prefix.shape]:
                    raise ProtocolError(f"registered prompts {list(deep.shape)} do not fit the request")
                request.deep = deep
            else:
                raise Refusal(ErrorCode.PROMPTS_LOST, "these prompts are not registered here any more")

    def _register(self, key: int, deep: torch.Tensor | None) -> None:
        """Keeps prompts [n, P, H] at the client's expense. Raises ProtocolError if they can be of no use here."""
        span, most = self._backend.span, self._backend.limits.max_batch_tokens
        if deep is None:
            raise ProtocolError("the tensor `deep` is missing")
        blocks, length, size = deep.shape
        if not 1 <= blocks <= span.end - span.start or size != span.hidden_size or not 1 <= length < most:
            raise ProtocolError(
                f"prompts are {list(deep.shape)}, must be of up to {span.end - span.start} blocks and fewer than "
                f"{most} positions, of hidden size {span.hidden_size}"
            )
        self._forget_prompts(key)
        while len(self._prompts) >= _MAX_PROMPTS:
            self._forget_prompts(next(iter(self._prompts)))
        if (refusal := self._charge(deep.nbytes)) is not None:
            raise Refusal(ErrorCode.OVERLOADED, f"no room for prompts: {refusal}")
        self._prompts[key] = deep.clone()  # or all that came with them would stay, too
        self._prompts_came.set()

    def _forget_prompts(self, key: int) -> None:
        if (deep := self._prompts.pop(key, None)) is not None:
            self._release(deep.nbytes)

    async def _forward_with_prompts(self, call_id: int, request: ForwardRequest) -> Message:
        """A forward that came by other servers, before its prompts which come straight from the client."""
        with suppress(TimeoutError):  # then they are lost, as `_admit` will say
            async with asyncio.timeout(_PROMPTS_PATIENCE):
                while request.prompts_key not in self._prompts:
                    self._prompts_came.clear()
                    await self._prompts_came.wait()
        self._admit(request)
        return await self._forward(call_id, request)

    def _session_cache(self, call_id: int, request: StepRequest) -> SessionCache:
        """The cache that a step goes on with, opened here if the step says so."""
        key = (self._number, request.session)
        if request.max_length is not None:
            self._backend.open_cache(key, request, self._peer)
        cache = self._backend.caches.get(key)
        if cache is None:
            raise Refusal(ErrorCode.CACHE_LOST, "this session is not held here any more")
        cache.check(request)
        if call_id <= cache.last_call:  # it was given up, and is late on its way through other servers
            raise ProtocolError("a newer step of this session was here before this one")
        cache.last_call = call_id
        return cache

    async def _answer(self, call_id: int, handler: Handler) -> None:
        self._backend.under_way += 1
        try:
            answer = await self._result(handler)
            del handler  # and with it the request's tensors
            await self._reply(call_id, self._charged(answer))
        finally:  # not before it is written: a client that does not read its answers must not get more of them made
            self._backend.under_way -= 1

    def _charged(self, answer: Message) -> Message:
        """The answer, which counts until it is written where it is larger than its request; or why there is no room."""
        task = asyncio.current_task()
        assert task is not None
        if task not in self._sizes or (more := answer.num_bytes - self._sizes[task]) <= 0:
            return answer
        if (refusal := self._charge(more)) is not None:
            words = f"no room for the answer: {refusal}"
            return Message(Method.ERROR, {"code": ErrorCode.OVERLOADED.value, "message": words})
        self._sizes[task] += more
        return answer

    async def _result(self, handler: Handler) -> Message:
        try:
            return await handler()
        except Exception as e:
            refusal = self._backend.refusal(e, self._peer)
            return Message(Method.ERROR, {"code": refusal.code.value, "message": str(refusal)})

    async def _hand_over(self, handler: Handler, request: Message, route: list[Hop]) -> Message:
        """Runs a request and sends the next server what it needs; returns what is left for the client."""
        onward, home = split_reply(request.method, await handler(), carried_tensors(request), route)
        links, following = self._backend.links, route[0].peer
        if links is None:
            raise Refusal(ErrorCode.NOT_HANDED_OVER, "this server hands nothing over")
        try:
            await links.send(following, onward)
        except ConnectionError as e:
            raise Refusal(ErrorCode.NOT_HANDED_OVER, f"cannot hand over to server …{following[-6:]}: {e}") from e
        return home

    async def _forward(self, call_id: int, request: ForwardRequest) -> Message:
        backend = self._backend
        size = backend.graph_size(request)
        keep = request.keep and backend.graphs.make_room(size)

        def compute() -> tuple[SpanGraph | None, dict[str, torch.Tensor]]:
            if keep:
                graph = self._run_with_graph(request)
                graph.num_bytes = size
                outputs = graph.outputs
            else:
                graph = None
                with torch.no_grad():
                    out, prefix = backend.span.forward(self._inputs(request))
                outputs = [out] if prefix is None else [out, prefix]
            named = {"hidden": outputs[0]}
            if request.want_prefix and len(outputs) > 1:
                named["prefix"] = outputs[1]
            return graph, backend.span.transfers.outputs_to_wire(named, request.wire_dtype)

        timed = await backend.compute.run(Priority.FORWARD, compute, client=self._peer, key=(self._number, call_id))
        graph, tensors = timed.value
        if graph is not None:
            backend.graphs.put((self._number, call_id), graph, self._peer)
        fields = {"kept": graph is not None, "queue": timed.queued, "compute": timed.computed}
        return Message(Method.OK, fields, tensors, int8_blockwise=request.wire_dtype == INT8_BLOCKWISE)

    async def _step(self, call_id: int, request: StepRequest, cache: SessionCache) -> Message:
        is_alone = self._backend.caches.is_alone((self._number, request.session))
        step = SessionStep(self._backend.span, cache, request, is_alone=is_alone)
        timed = await self._backend.compute.run(step.priority, step, client=self._peer, key=(self._number, call_id))
        fields = {"queue": timed.queued, "compute": timed.computed}
        return Message(Method.OK, fields, timed.value, int8_blockwise=request.wire_dtype == INT8_BLOCKWISE)

    async def _backward(self, call_id: int, request: BackwardRequest) -> Message:
        span = self._backend.span
        graph = None
        if request.graph is not None:
            graph = self._backend.graphs.pop((self._number, request.graph))
            if graph is None:
                raise Refusal(ErrorCode.GRAPH_LOST, "the kept graph is gone")
            self._check_grads(request, graph.inputs)

        def compute() -> dict[str, torch.Tensor]:
            kept = graph
            if kept is None:
                assert request.forward is not None
                inputs = self._inputs(request.forward)
                self._check_grads(request, inputs)
                kept = span.forward_with_graph(inputs, input_grad=request.forward.input_grad)
            grads = span.backward(kept, request.grad, request.grad_prefix)
            return {name: span.transfers.to_wire(grad, request.wire_dtype) for name, grad in grads.items()}

        timed = await self._backend.compute.run(
            Priority.BACKWARD, compute, client=self._peer, key=(self._number, call_id)
        )
        fields = {"queue": timed.queued, "compute": timed.computed}
        return Message(Method.OK, fields, timed.value, int8_blockwise=request.wire_dtype == INT8_BLOCKWISE)

    def _run_with_graph(self, request: ForwardRequest) -> SpanGraph:
        """For the compute thread. The prefix of a step runs once while a graph of an earlier micro-batch is kept."""
        earlier = self._prefix_run() if self._prefix_run is not None else None
        graph = self._backend.span.forward_with_graph(
            self._inputs(request), input_grad=request.input_grad, prefix_run=earlier
        )
        self._prefix_run = weakref.ref(graph.prefix_run) if graph.prefix_run is not None else None
        return graph

    def _inputs(self, request: ForwardRequest) -> SpanInputs:
        rows = request.rows.long() if request.rows is not None else None
        return SpanInputs(request.start, request.end, request.hidden, request.prefix, request.deep, rows)

    def _check_grads(self, request: BackwardRequest, inputs: SpanInputs) -> None:
        expected = list(inputs.hidden.shape) if inputs.rows is None else [len(inputs.rows), inputs.hidden.shape[2]]
        if list(request.grad.shape) != expected:
            raise Refusal(ErrorCode.BAD_REQUEST, f"grad is {list(request.grad.shape)}, must be {expected}")
        if request.grad_prefix is not None and (
            inputs.prefix is None or request.grad_prefix.shape != inputs.prefix.shape
        ):
            raise Refusal(ErrorCode.BAD_REQUEST, "grad_prefix does not fit the forward's prefix")

    async def _reply(self, call_id: int, message: Message) -> None:
        try:
            await self._writer.send(call_id, message)
        except ConnectionError:
            logger.debug("client …%s left before its answer", self._peer[-6:])


def _failing(error: Refusal) -> Handler:
    async def fail() -> Message:
        raise error

    return fail
