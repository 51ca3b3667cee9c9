"""One stream to one server, with many concurrent requests and a failure detector.

When the stream ends, everything in flight on it fails at once. A server that owes an answer is pinged. A server that is
busy, or has a long queue, still answers with our requests' places in its queue; a hung one does not.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from hivemind.p2p import P2P

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.flow_control import RequestWindow
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.errors import PeerFailure, ProtocolError
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.auth import is_proof, new_nonce, prove
from petals_lightning.protocol.checks import printable
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import STREAM_METHOD, ErrorCode, Message, Method
from petals_lightning.protocol.requests import to_wire
from petals_lightning.swarm.streams import open_stream

_MAX_MESSAGE_BYTES = 4 << 30  # of all answers in flight together; each answer's limit follows from its request
_ADAPTERS_KEPT = 8  # as many as a server keeps for one stream


@dataclass
class _Call:
    """A request that awaits its answer.

    Attributes:
        clock: runs while the server works on it, up to `deadline` seconds.
        max_bytes: the most memory that the answer may take.
    """

    answer: asyncio.Future[Message]
    clock: ServiceTimer
    deadline: float
    max_bytes: int


class PeerConnection:
    """Our stream to one server; made by `open`. All methods belong to the node's loop.

    Args:
        peer: the server's base58 id.
        reader, writer: the stream.
        config, stats: of the client.
        on_failure: called once if the server hangs or the stream ends, even when no request is in flight.
    """

    cuts_steps = False

    def __init__(
        self,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        config: ClientConfig,
        stats: TransferStats,
        on_failure: Callable[[PeerFailure], None] = lambda failure: None,
    ):
        self.peer = peer
        self.info: dict[str, Any] = {}
        self.round_trip: float | None = None
        self._config, self._stats, self._on_failure = config, stats, on_failure
        self._reader = MessageReader(
            reader,
            max_message_bytes=_MAX_MESSAGE_BYTES,
            max_open=1 << 16,
            limit=self._answer_limit,
            reserve=self._still_wanted,
        )
        self._writer = MessageWriter(writer)
        self._ids, self._last_id = itertools.count(1), 0
        self._pending: dict[int, _Call] = {}
        self._window = RequestWindow(max_requests=1, max_bytes=0)  # until the server has stated its limits
        self._adapters: OrderedDict[tuple[int, int, int], tuple[int, asyncio.Task[None]]] = OrderedDict()
        self._failure: PeerFailure | None = None
        self._pinged_at: float | None = None  # when the oldest unanswered ping was sent
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> Self:
        """Starts to read answers and to monitor the server."""
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        return self

    @classmethod
    async def open(
        cls,
        p2p: P2P,
        peer: str,
        config: ClientConfig,
        stats: TransferStats,
        on_failure: Callable[[PeerFailure], None] = lambda failure: None,
    ) -> PeerConnection:
        """Opens a stream, proves knowledge of the swarm's token if there is one, and asks the server what it holds.

        Raises:
            PeerFailure: the server cannot be reached in `connect_timeout` seconds, lacks our stream method, or refuses
                this peer.
        """
        connection = None
        try:
            async with asyncio.timeout(config.connect_timeout):
                streams = await open_stream(p2p, peer, STREAM_METHOD)
                connection = cls(peer, *streams, config, stats, on_failure).start()
                if config.swarm_token is not None:
                    await connection._authenticate(config.swarm_token, p2p.peer_id.to_base58())
                began = time.perf_counter()
                connection.info = (await connection.call(Message(Method.INFO))).fields
                connection.round_trip = time.perf_counter() - began
                connection._take_grants()
        except BaseException as e:
            if connection is not None:
                connection.close()
            if isinstance(e, OSError):  # ConnectionError, or TimeoutError
                raise PeerFailure(peer, f"cannot connect: {str(e) or type(e).__name__}") from e
            raise
        return connection

    def _take_grants(self) -> None:
        """Applies the limits in `info`, with a margin: the server counts a request until its answer is written."""
        names = "max_open_requests", "max_message_bytes", "max_batch_tokens"
        requests, num_bytes, tokens = (self.info.get(name) or 0 for name in names)
        if not all(type(grant) is int and grant > 0 for grant in (requests, num_bytes, tokens)):
            raise PeerFailure(
                self.peer, f"states impossible limits: {requests!r} requests, {num_bytes!r} bytes, {tokens!r} tokens"
            )
        self._window = RequestWindow(max(1, requests // 2), num_bytes // 2)

    @property
    def is_open(self) -> bool:
        return self._failure is None

    @property
    def silence(self) -> float:
        """Seconds since the oldest unanswered ping; 0 if none is unanswered."""
        if self._pinged_at is None or self._reader.heard_at > self._pinged_at:
            return 0.0
        return time.monotonic() - self._pinged_at

    async def call(
        self,
        message: Message,
        call_id: int | None = None,
        *,
        deadline: float | None = None,
        clock: ServiceTimer | None = None,
    ) -> Message:
        """As `ServerConnection.call`; the stream sends it under `call_id`."""
        call_id = call_id if call_id is not None else self.next_id()
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        call = _Call(answer, clock or ServiceTimer(), deadline or self._config.request_timeout, message.answer_bytes)
        call.clock.pause()
        try:
            async with self._window.enter(message.num_bytes):
                if self._failure is not None:
                    raise self._failure
                self._pending[call_id] = call
                call.clock.restart()
                self._stats.bytes_sent += await self._writer.send(call_id, message)
                call.clock.restart()
                reply = await answer
        except ConnectionError as e:
            self._fail(PeerFailure(self.peer, f"the stream broke ({e})"))
            assert self._failure is not None
            raise self._failure from None
        finally:
            self._forget(call_id, answer)
        self._stats.requests += message.method in (Method.FORWARD, Method.BACKWARD)
        if reply.method is Method.ERROR:
            raise self._error(reply)
        return reply

    async def expect(
        self, call_id: int, *, max_bytes: int, deadline: float | None = None, clock: ServiceTimer | None = None
    ) -> Message:
        """Waits for the answer to a request that another server hands over to this server. Raises as `call`.

        Args:
            call_id: from `next_id`.
            max_bytes: the most memory that the answer may take.
            deadline, clock: as in `call`. The clock is paused until the caller knows that the request has arrived.
        """
        if self._failure is not None:
            raise self._failure
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        call = self._pending[call_id] = _Call(
            answer, clock or ServiceTimer(), deadline or self._config.request_timeout, max_bytes
        )
        call.clock.pause()
        try:
            reply = await answer
        finally:
            self._forget(call_id, answer)
        if reply.method is Method.ERROR:
            raise self._error(reply)
        return reply

    def next_id(self) -> int:
        """A new call id, for callers that refer to the call later."""
        self._last_id = next(self._ids)
        return self._last_id

    async def register_adapter(self, adapter: Adapter, wire_dtype: str) -> int:
        """As `ServerConnection.register_adapter`: each is sent once, even if several callers wait for it."""
        identity = (adapter.version, adapter.start, adapter.end)
        if identity not in self._adapters:
            key = self.next_id()
            sent = self._as_sent(adapter).map(lambda tensor: to_wire(tensor, wire_dtype, shared=True))
            message = sent.to_message(key)
            sending = asyncio.create_task(self._send_adapter(message))
            sending.add_done_callback(lambda done: done.cancelled() or done.exception())  # callers may be cancelled
            self._adapters[identity] = key, sending
            while len(self._adapters) > _ADAPTERS_KEPT:
                self._adapters.popitem(last=False)
        key, sending = self._adapters[identity]
        await asyncio.shield(sending)
        return key

    def _as_sent(self, adapter: Adapter) -> Adapter:
        held = self.info.get("adapters")
        try:
            return adapter.as_sent(held if isinstance(held, dict) else {})
        except ProtocolError as e:
            raise PeerFailure(self.peer, str(e), ErrorCode.NOT_SERVED.value) from e

    async def _send_adapter(self, message: Message) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            self._stats.bytes_sent += await self._writer.send(self.next_id(), message)
        except ConnectionError as e:
            self._fail(PeerFailure(self.peer, f"the stream broke ({e})"))
            assert self._failure is not None
            raise self._failure from None

    def forget_adapters(self) -> None:
        """Notes that the server has dropped a registered adapter: all are sent again when next needed."""
        self._adapters.clear()

    def tell(self, message: Message, call_id: int = 0) -> None:
        """Sends a message that needs no answer. Does nothing if the stream is lost."""
        if self._failure is None:
            task = asyncio.create_task(self._writer.send(call_id, message))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # `_read` notices a lost stream

    def close(self) -> None:
        self._on_failure = lambda failure: None
        self._fail(PeerFailure(self.peer, "the connection was closed"))

    def _forget(self, call_id: int, answer: asyncio.Future[Message]) -> None:
        if self._pending.pop(call_id, None) is not None and (not answer.done() or answer.cancelled()):
            self.tell(Message(Method.CANCEL), call_id)
        if answer.done() and not answer.cancelled():
            answer.exception()  # mark the exception as retrieved; the caller has received it

    def _error(self, reply: Message) -> PeerFailure:
        code, text = str(reply.fields.get("code")), printable(str(reply.fields.get("message")), 500)
        return PeerFailure(self.peer, text, code)

    async def _read(self) -> None:
        try:
            while await self._read_one():
                pass
            self._fail(PeerFailure(self.peer, "the stream ended"))
        except ProtocolError as e:
            self._fail(PeerFailure(self.peer, f"protocol broken: {e}"))
        except PeerFailure as e:
            self._fail(e)

    async def _read_one(self) -> bool:
        """Reads one message, and keeps no reference to it while the next is awaited. False at the stream's end."""
        if (item := await self._reader.next()) is None:
            return False
        call_id, message, num_bytes = item
        self._stats.bytes_received += num_bytes
        self._take(call_id, message)
        return True

    def _answer_limit(self, call_id: int) -> int | None:
        return call.max_bytes if (call := self._pending.get(call_id)) is not None else None

    def _still_wanted(self, num_bytes: int, call_id: int, method: Method, fields: dict[str, Any]) -> str | None:
        return None if call_id in self._pending else "the request was given up"

    def _take(self, call_id: int, message: Message) -> None:
        call = self._pending.get(call_id)
        if message.method not in (Method.OK, Method.ERROR):
            raise ProtocolError(f"a server may not send {message.method.value!r}")
        if call is not None:
            if not call.answer.done():
                call.answer.set_result(message)
        elif call_id == 0 and message.method is Method.ERROR:
            raise PeerFailure(
                self.peer, printable(str(message.fields.get("message")), 300), str(message.fields.get("code"))
            )
        elif call_id == 0:
            self._note_standings(message.fields.get("calls"))
        elif call_id > self._last_id:
            raise ProtocolError(f"an answer to call {call_id}, which was never made")

    def _note_standings(self, calls: Any) -> None:
        """Pauses the clocks of requests that wait in the server's queue."""
        if not isinstance(calls, list):
            return
        for entry in calls:
            match entry:
                case [int(call_id), int(ahead)] if ahead > 0 and call_id in self._pending:
                    self._pending[call_id].clock.queue(ahead)

    async def _watch(self) -> None:
        """Pings while an answer is owed. Detects a hung server, and requests past their deadline."""
        period, limit = self._config.heartbeat_period, self._config.heartbeat_timeout
        pinged = time.monotonic()
        while True:
            await asyncio.sleep(period / 4)
            now = time.monotonic()
            alive_at = max(self._reader.heard_at, self._writer.wrote_at)
            if self._pinged_at is not None and self._reader.heard_at > self._pinged_at:
                self._pinged_at = None
            if self._pinged_at is not None and now - max(self._pinged_at, alive_at) > limit - period:
                self._fail(PeerFailure(self.peer, f"a ping was not answered for {now - self._pinged_at:.0f} s"))
                return
            for call in self._pending.values():
                reason = call.clock.overdue(call.deadline, self._config.request_timeout)
                if reason is not None and not call.answer.done():
                    call.answer.set_exception(PeerFailure(self.peer, reason))
            if now - pinged >= period and (self._pinged_at is not None or self._pending):
                pinged = now
                self._pinged_at = self._pinged_at or now
                self.tell(Message(Method.PING))

    async def _authenticate(self, token: str, own_id: str) -> None:
        """Each side proves to the other that it knows the swarm's token. Raises PeerFailure."""
        nonce = new_nonce()
        challenge = (await self.call(Message(Method.AUTH, {"nonce": nonce}))).fields.get("nonce")
        if not isinstance(challenge, bytes):
            raise PeerFailure(self.peer, "sent no challenge", ErrorCode.NOT_ALLOWED.value)
        proofs = {
            role: prove(token, role, client=own_id, server=self.peer, client_nonce=nonce, server_nonce=challenge)
            for role in ("client", "server")
        }
        reply = await self.call(Message(Method.AUTH, {"proof": proofs["client"]}))
        if not is_proof(reply.fields.get("proof"), proofs["server"]):
            raise PeerFailure(self.peer, "does not know the swarm's token itself", ErrorCode.NOT_ALLOWED.value)

    def _fail(self, failure: PeerFailure) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        for call in self._pending.values():
            if not call.answer.done():
                call.answer.set_exception(failure)
        self._pending.clear()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._writer.close()
        self._on_failure(failure)
