"""One stream to one server: many requests at once, and the failure detector.

When the stream ends, everything in flight on it fails at once. When a server that owes an answer is silent, it is
pinged; a server that computes still answers pings, one that hangs does not.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from typing import Any

from hivemind.p2p import P2P

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.room import Room
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import PeerFailure, ProtocolError, RemoteRequestError
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import STREAM_METHOD, ErrorCode, Message, Method
from petals_lightning.swarm.streams import open_stream

_MAX_MESSAGE_BYTES = 4 << 30  # a client trusts the sizes that it asked for; this only bounds nonsense
_PROMPTS_KEPT = 8  # as many sets of prompts as a server keeps for one stream


class PeerConnection:
    """Made by `open`; all methods belong to the node's loop."""

    def __init__(
        self,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        config: ClientConfig,
        stats: TransferStats,
    ):
        self.peer = peer
        self.info: dict[str, Any] = {}
        self.round_trip: float | None = None
        self._config, self._stats = config, stats
        self._reader = MessageReader(reader, max_message_bytes=_MAX_MESSAGE_BYTES, max_open=1 << 16)
        self._writer = MessageWriter(writer)
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._room = Room(max_requests=1, max_bytes=0)  # until the server has said what it grants
        self._prompts: OrderedDict[tuple[int, int, int], tuple[int, asyncio.Future[None]]] = OrderedDict()
        self._failure: PeerFailure | None = None
        self._last_heard = time.monotonic()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @classmethod
    async def open(cls, p2p: P2P, peer: str, config: ClientConfig, stats: TransferStats) -> PeerConnection:
        """Opens a stream and asks the server what it holds.

        Raises:
            PeerFailure: the server cannot be reached in `connect_timeout` seconds, or does not know our stream method.
        """
        connection = None
        try:
            async with asyncio.timeout(config.connect_timeout):
                connection = cls(peer, *await open_stream(p2p, peer, STREAM_METHOD), config, stats)
                began = time.perf_counter()
                connection.info = (await connection.call(Message(Method.INFO))).fields
                connection.round_trip = time.perf_counter() - began
                connection._take_grants()
        except (OSError, PeerFailure) as e:  # OSError: ConnectionError, or TimeoutError
            if connection is not None:
                connection.close()
            if isinstance(e, PeerFailure):
                raise
            raise PeerFailure(peer, f"cannot connect: {e or type(e).__name__}") from e
        return connection

    def _take_grants(self) -> None:
        """Keeps to the limits in `info`, with a margin: the server counts a request until its answer is written."""
        names = "max_open_requests", "max_message_bytes", "max_batch_tokens"
        requests, num_bytes, tokens = (self.info.get(name) or 0 for name in names)
        if not all(type(grant) is int and grant > 0 for grant in (requests, num_bytes, tokens)):
            raise PeerFailure(
                self.peer, f"grants nonsense: {requests!r} requests, {num_bytes!r} bytes, {tokens!r} tokens"
            )
        self._room = Room(max(1, requests // 2), num_bytes // 2)

    @property
    def is_open(self) -> bool:
        return self._failure is None

    async def call(
        self, message: Message, call_id: int | None = None, *, sent: asyncio.Future[None] | None = None
    ) -> Message:
        """Sends a request and waits for its reply; resolves `sent`, if given, when the request is on its way.

        Raises:
            PeerFailure: the stream or the server failed, or it refused for a reason that others may not have.
            RemoteRequestError: the server says that the request is wrong or that it fails on it.
        """
        call_id = call_id if call_id is not None else self.next_id()
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        try:
            if self._failure is not None:
                raise self._failure
            self._pending[call_id] = answer
            if len(self._pending) == 1:
                self._last_heard = time.monotonic()  # silence counts from when an answer is owed
            num_bytes = sum(tensor.nbytes for tensor in message.tensors.values())
            async with self._room.enter(num_bytes), asyncio.timeout(self._config.request_timeout):
                self._stats.bytes_sent += await self._writer.send(call_id, message)
                if sent is not None and not sent.done():
                    sent.set_result(None)
                reply = await answer
        except TimeoutError:
            raise PeerFailure(self.peer, f"no answer within {self._config.request_timeout:g} s") from None
        except ConnectionError as e:
            self._fail(PeerFailure(self.peer, f"the stream broke ({e})"))
            assert self._failure is not None
            raise self._failure from None
        finally:
            if sent is not None and not sent.done():
                sent.cancel()
            if self._pending.pop(call_id, None) is not None and not answer.done():
                self.tell(Message(Method.CANCEL), call_id)
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen: whoever asked is told by what was raised here
        self._stats.requests += message.method in (Method.FORWARD, Method.BACKWARD)
        if reply.method is Method.ERROR:
            raise self._error(reply)
        return reply

    def next_id(self) -> int:
        """A fresh call id, for callers that refer to the call later."""
        return next(self._ids)

    async def prompts_key(self, version: int, start: int, end: int) -> tuple[int, asyncio.Future[None] | None]:
        """The key under which this stream's server has deep prompts [start, end) of a version.

        Returns:
            The key, and for the first caller a future: it sends the prompts along and resolves the future when they
            are on their way. Others wait for that here, so that the server never sees a key before its prompts.
        """
        wanted = (version, start, end)
        while wanted in self._prompts:
            key, sent = self._prompts[wanted]
            await asyncio.wait([sent])
            if not sent.cancelled():
                return key, None
            if self._prompts.get(wanted) == (key, sent):  # or another waiter has begun to send them anew
                del self._prompts[wanted]
        sent = asyncio.get_running_loop().create_future()
        key = self.next_id()
        self._prompts[wanted] = key, sent
        while len(self._prompts) > _PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        return key, sent

    def forget_prompts(self) -> None:
        """The server has dropped registered prompts: they are sent again when next needed."""
        self._prompts.clear()

    def tell(self, message: Message, call_id: int = 0) -> None:
        """Sends what needs no answer; does nothing on a lost stream."""
        if self._failure is None:
            task = asyncio.create_task(self._writer.send(call_id, message))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a lost stream shows elsewhere

    def close(self) -> None:
        self._fail(PeerFailure(self.peer, "the connection was closed"))

    def _error(self, reply: Message) -> Exception:
        code, words = str(reply.fields.get("code")), str(reply.fields.get("message"))[:500]
        if code in (ErrorCode.BAD_REQUEST.value, ErrorCode.INTERNAL.value):
            return RemoteRequestError(f"server …{self.peer[-6:]} says: {words}")
        return PeerFailure(self.peer, words, code)

    async def _read(self) -> None:
        try:
            while (item := await self._reader.next()) is not None:
                self._last_heard = time.monotonic()
                call_id, message, num_bytes = item
                self._stats.bytes_received += num_bytes
                answer = self._pending.get(call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
                elif message.method is Method.ERROR and call_id == 0:
                    raise ProtocolError(str(message.fields.get("message"))[:300])
            self._fail(PeerFailure(self.peer, "the stream ended"))
        except ProtocolError as e:
            self._fail(PeerFailure(self.peer, f"protocol broken: {e}"))

    async def _watch(self) -> None:
        period, limit = self._config.heartbeat_period, self._config.heartbeat_timeout
        while True:
            await asyncio.sleep(period)
            silent = time.monotonic() - self._last_heard
            if not self._pending:
                continue
            if silent > limit:
                self._fail(PeerFailure(self.peer, f"silent for {silent:.0f} s"))
                return
            if silent > period:
                self.tell(Message(Method.PING))

    def _fail(self, failure: PeerFailure) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(failure)
        self._pending.clear()
        for _, sent in self._prompts.values():
            sent.cancel()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._writer.close()
