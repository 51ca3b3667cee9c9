"""One client's stream: reads its messages, has them run, and writes the answers.

Another server's stream is read here too. What it hands over goes to the stream of the client that permits it, and is
that client's request from its first byte.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from petals_lightning.errors import ProtocolError
from petals_lightning.heap import trim_heap
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.checks import typed
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
from petals_lightning.server.access.quotas import ClientUsage
from petals_lightning.server.access.rules import Gate
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.stream_requests import Handler, RegisteredAdapters, StreamRequests

logger = logging.getLogger(__name__)

_MAX_FAREWELL = 2.0  # seconds that a client may take to read why its stream is refused
_TRIM_BYTES = 4 << 20  # a stream that held at least this much has the heap trimmed when it ends


class ClientStream:
    """Serves one stream until it ends, then frees what the client left on the server.

    Args:
        resources: of the server.
        streams: the server's open streams by number; this one adds itself while it is served.
        peer: the client's base58 id, authenticated by the transport.
        reader, writer: the stream.
    """

    def __init__(
        self,
        resources: ServerResources,
        streams: dict[int, ClientStream],
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ):
        self._resources, self._streams, self._peer = resources, streams, peer
        self._number, limits = next(resources.stream_numbers), resources.limits
        self._gate = Gate(resources.rules, peer, resources.peer_id)
        self._usage, self._reserved = ClientUsage(), 0
        self._key, self._has_ended = new_stream_key(), False
        self._reader = MessageReader(
            reader,
            max_message_bytes=limits.max_message_bytes,
            max_open=limits.max_open_requests,
            reserve=self._reserve_partial,
            release=self._release_partial,
        )
        self._stream, self._writer = reader, MessageWriter(writer)
        self._group = asyncio.TaskGroup()  # of the requests that are not answered yet
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._sizes: dict[asyncio.Task[None], int] = {}
        self._adapters = RegisteredAdapters(resources, self._reserve, self._release)
        self._requests = StreamRequests(resources, peer, self._number, self._adapters)
        self._used_calls = UsedCalls()  # handed over, or given up while other servers may still bring them

    async def serve(self) -> None:
        usage = self._resources.quotas.open_stream(self._peer)
        if isinstance(usage, str):
            await self._refuse_stream(ErrorCode.OVERLOADED, usage)
            self._writer.close()
            return
        self._usage = usage
        self._streams[self._number] = self
        try:
            async with self._group:
                try:
                    await self._read()
                finally:
                    del self._streams[self._number]
                    for task in list(self._tasks.values()):
                        task.cancel()
                    self._requests.free()
                    self._writer.close()
        finally:
            self._reader.abandon()
            self._adapters.clear()  # now: this object is part of reference cycles, which may live for long
            if self._reserved >= _TRIM_BYTES:
                trim_heap()
            self._release(self._reserved)  # includes a message that broke the protocol
            self._has_ended = True
            self._resources.quotas.close_stream(self._peer)

    async def _read(self) -> None:
        """Serves messages until the stream ends."""
        try:
            while await self._read_one():
                pass
        except ProtocolError as e:
            logger.warning("client …%s breaks the protocol: %s", self._peer[-6:], e)
            await self._refuse_stream(ErrorCode.BAD_REQUEST, str(e))

    async def _read_one(self) -> bool:
        """Serves one message; False at the end of the stream.

        A method of its own, so that the message is freed while the next one is waited for.
        """
        if (item := await self._reader.next()) is None:
            return False
        await self._dispatch(item[0], item[1])
        return True

    async def _refuse_stream(self, code: ErrorCode, reason: str) -> None:
        """Tells the client why its stream ends, and waits until it closes its end.

        Meanwhile its bytes are read and dropped: libp2p resets a stream that is closed over unread bytes, and the
        reason would be lost on its way.
        """
        await self._reply(0, Message.error(code, reason))
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_MAX_FAREWELL):
                while await self._stream.read(CHUNK_BYTES):
                    pass

    async def _dispatch(self, call_id: int, message: Message) -> None:
        if message.method is Method.AUTH:
            await self._reply(call_id, self._gate.answer(message.fields))
            self._release(message.reserved)
            return
        if message.method is Method.HANDOVER:  # the client's permit takes the place of this server's rules
            await self._reply(call_id, self._take_over(message))
            return
        if not self._gate.is_open:
            refusal = self._gate.refusal()
            if message.method is Method.INFO:  # a server that hands over to this one needs to know its limit
                refusal.fields["max_message_bytes"] = self._resources.limits.max_message_bytes
            await self._reply(call_id, refusal)
            return
        match message.method:
            case Method.PING:
                await self._reply(call_id, Message(Method.OK, {"calls": self._queue_positions()}))
            case Method.INFO:
                own = {"stream": self._number, "stream_key": self._key}
                await self._reply(call_id, Message(Method.OK, self._resources.info | own))
            case Method.CANCEL:
                if (task := self._tasks.get(call_id)) is not None:
                    task.cancel()
                    self._close_request(call_id, task)  # now: the next request may be read before the task ends
                else:
                    self._used_calls.add(call_id)
            case Method.END_SESSION:
                self._resources.caches.pop((self._number, typed(message.fields, "session", int)))
            case Method.ADAPTER:
                if message.dropped:  # it has no answer; the requests that name this adapter get the reason
                    self._adapters.refuse(message.dropped)
                else:
                    self._adapters.register(*Adapter.from_message(message))
            case Method.FORWARD | Method.BACKWARD | Method.STEP:
                self._begin(call_id, message)
                return
            case _:
                raise ProtocolError(f"a client may not send {message.method.value!r}")
        self._release(message.reserved)

    def _begin(self, call_id: int, message: Message, *, handed_over: bool = False) -> None:
        if call_id in self._tasks:
            raise ProtocolError(f"call id {call_id} is used twice")
        # Admitted here and not in the task, so that requests see adapters in the order in which both were sent.
        handler = self._admit(call_id, message, handed_over)
        self._usage.requests += 1
        task = self._group.create_task(self._answer(call_id, handler))
        self._tasks[call_id] = task
        self._sizes[task] = message.reserved
        task.add_done_callback(lambda done: self._close_request(call_id, done))

    def _admit(self, call_id: int, message: Message, handed_over: bool) -> Handler:
        """What answers a request: its handler, or a refusal."""
        try:
            limits = self._resources.limits
            if self._resources.leaving:
                raise Refusal(ErrorCode.LEAVING, "the server is shutting down")
            if self._usage.requests >= limits.max_open_requests:
                reason = f"this client has {limits.max_open_requests} requests open, which is the limit"
                raise Refusal(ErrorCode.OVERLOADED, reason)
            if message.dropped:
                raise Refusal(ErrorCode.OVERLOADED, f"no room: {message.dropped}")
            route = read_route(message.fields)
            handler = self._requests.admit(call_id, message, is_last=not route, handed_over=handed_over)
        except ProtocolError as e:
            return _refusing(Refusal(ErrorCode.BAD_REQUEST, str(e)))
        except Refusal as e:
            return _refusing(e)
        return (lambda: self._hand_over(handler, message, route)) if route else handler

    def _take_over(self, message: Message) -> Message:
        """Begins a request that another server hands over for one of our clients; the answer says whether."""
        envelope = Envelope.from_fields(message.fields)
        client = self._payer(Method.HANDOVER, message.fields)
        if client is None:
            reason = "no client's stream here permits this (or it has ended)"
        elif envelope.call in client._tasks or not client._used_calls.add(envelope.call):
            client._release(message.reserved)
            reason = f"call {envelope.call} was handed over before, or given up by its client: a permit is good once"
        else:
            client._begin(envelope.call, envelope.open(message), handed_over=True)
            return Message(Method.OK)
        return Message.error(ErrorCode.NOT_ALLOWED, reason)

    async def _hand_over(self, handler: Handler, request: Message, route: list[Hop]) -> Message:
        """Runs a request and sends the next server its part; returns the client's part."""
        onward, home = split_reply(request.method, await handler(), carried_tensors(request), route)
        links, following = self._resources.links, route[0].peer
        if links is None:
            raise Refusal(ErrorCode.NOT_HANDED_OVER, "this server hands nothing over")
        try:
            await links.send(following, onward)
        except ConnectionError as e:
            raise Refusal(ErrorCode.NOT_HANDED_OVER, f"cannot hand over to server …{following[-6:]}: {e}") from e
        return home

    async def _answer(self, call_id: int, handler: Handler) -> None:
        self._resources.open_requests += 1
        try:
            answer = await self._result(handler)
            del handler  # frees the request's tensors
            await self._reply(call_id, self._charged(answer))
        finally:  # only after writing: a client that reads no answers must not get more of them computed
            self._resources.open_requests -= 1

    async def _result(self, handler: Handler) -> Message:
        try:
            return await handler()
        except Exception as e:
            return self._resources.refusal(e, self._peer).to_message()

    def _charged(self, answer: Message) -> Message:
        """Counts an answer that is larger than its request until it is written; a refusal if there is no room."""
        task = asyncio.current_task()
        assert task is not None
        if task not in self._sizes or (more := answer.num_bytes - self._sizes[task]) <= 0:
            return answer
        if (reason := self._reserve(more)) is not None:
            return Message.error(ErrorCode.OVERLOADED, f"no room for the answer: {reason}")
        self._sizes[task] += more
        return answer

    def _close_request(self, call_id: int, task: asyncio.Task[None]) -> None:
        """Releases what a request has reserved, once: it is answered or given up."""
        if (num_bytes := self._sizes.pop(task, None)) is not None:
            del self._tasks[call_id]
            self._usage.requests -= 1
            self._release(num_bytes)

    def _payer(self, method: Method, fields: dict[str, Any]) -> ClientStream | None:
        """The stream whose client pays for a message: for a handover the client that permits it. None: nobody."""
        if method is not Method.HANDOVER:
            return self if self._gate.is_open else None
        envelope = Envelope.from_fields(fields)
        client = self._streams.get(envelope.stream)
        return client if client is not None and envelope.is_permitted(client._key, self._peer) else None

    def _reserve_partial(self, num_bytes: int, call_id: int, method: Method, fields: dict[str, Any]) -> str | None:
        payer = self._payer(method, fields)
        return payer._reserve(num_bytes) if payer is not None else "no client pays for this"

    def _release_partial(self, num_bytes: int, method: Method, fields: dict[str, Any]) -> None:
        if (payer := self._payer(method, fields)) is not None:  # None: it has ended, and released all it had
            payer._release(num_bytes)

    def _reserve(self, num_bytes: int) -> str | None:
        """Counts bytes on this client's share; returns the reason if they do not fit."""
        if self._has_ended:
            return "the client's stream has ended"
        if (reason := self._resources.quotas.reserve(self._usage, num_bytes)) is None:
            self._reserved += num_bytes
        return reason

    def _release(self, num_bytes: int) -> None:
        if self._has_ended:
            return
        self._reserved -= num_bytes
        self._resources.quotas.release(self._usage, num_bytes)

    def _queue_positions(self) -> list[list[int]]:
        """For each open call, about how many requests run before it."""
        return [[call_id, self._resources.compute.ahead((self._number, call_id))] for call_id in self._tasks]

    async def _reply(self, call_id: int, message: Message) -> None:
        try:
            await self._writer.send(call_id, message)
        except ConnectionError:
            logger.debug("client …%s left before its answer", self._peer[-6:])


def _refusing(refusal: Refusal) -> Handler:
    async def refuse() -> Message:
        raise refusal

    return refuse
