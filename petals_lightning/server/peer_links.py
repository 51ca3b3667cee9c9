"""Streams to other servers, for handing over requests. All clients share them; each request pays for itself."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import OrderedDict
from contextlib import nullcontext
from typing import Self

from hivemind.p2p import P2P

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import CHUNK_BYTES, STREAM_METHOD, Message, Method
from petals_lightning.protocol.tensors import describe_tensors, packed_size
from petals_lightning.swarm.streams import open_stream

_CONNECT_TIMEOUT = 5.0  # seconds; the client waits for it before it uses direct mode
_MAX_LINKS = 64
_ANSWER_TIMEOUT, _SLOWEST = 10.0, 1 << 17  # seconds for an answer, plus one second for so many bytes
_SHORT_MESSAGE_BYTES = 2 * CHUNK_BYTES  # memory of a short message that may be sent along with a long one
_MAX_ANSWER_BYTES, _MAX_ANSWERS = 1 << 16, 1 << 10


class PeerLinks:
    """Opens a stream to each server that requests are handed over to, and keeps it. For the event loop only."""

    def __init__(self, p2p: P2P):
        self._p2p = p2p
        self._links: OrderedDict[str, asyncio.Task[PeerLink]] = OrderedDict()

    async def send(self, peer: str, message: Message) -> None:
        """Sends a handover; returns when the server has taken it.

        Raises:
            ConnectionError: the server cannot be reached, or does not take it.
        """
        task = self._links.get(peer)
        if task is None or (task.done() and not _is_open(task)):
            task = self._links[peer] = asyncio.create_task(PeerLink.open(self._p2p, peer))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved: `shield` raises it
        self._links.move_to_end(peer)
        while len(self._links) > _MAX_LINKS:
            _end(self._links.popitem(last=False)[1])
        await (await asyncio.shield(task)).send(message)

    def close(self) -> None:
        while self._links:
            _end(self._links.popitem()[1])


class PeerLink:
    """A stream to one server, which answers each message. `open` makes one.

    Args:
        reader, writer: the stream.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = MessageReader(reader, max_message_bytes=_MAX_ANSWER_BYTES, max_open=_MAX_ANSWERS)
        self._stream, self._writer = writer, MessageWriter(writer)
        self._max_message_bytes = math.inf  # until the server has told its limit
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._long = asyncio.Lock()
        self.is_open = True
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, p2p: P2P, peer: str) -> Self:
        """Opens a stream and asks the server how large a message may be.

        Raises:
            ConnectionError: the server cannot be reached or does not answer.
        """
        link = None
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                link = cls(*await open_stream(p2p, peer, STREAM_METHOD)).start()
                await link._learn_limit()
                return link
        except BaseException as e:
            if link is not None:
                link.close("the stream to it was closed")
            if isinstance(e, (TimeoutError, ValueError)):  # ValueError: the client's route names no valid peer id
                raise ConnectionError(f"no stream to it: {str(e) or type(e).__name__}") from e
            raise

    def start(self) -> Self:
        """Starts reading answers."""
        self._reading = asyncio.create_task(self._read())
        return self

    async def _learn_limit(self) -> None:
        limit = (await self._ask(Message(Method.INFO))).fields.get("max_message_bytes")
        if type(limit) is not int:
            raise ConnectionError("it does not say how large a message it takes")
        self._max_message_bytes = limit - _SHORT_MESSAGE_BYTES

    async def send(self, message: Message) -> None:
        """Returns when the server has taken the request. Raises ConnectionError if it does not."""
        description = describe_tensors(message.tensors, int8_blockwise=message.int8_blockwise)
        if (memory := packed_size(description)[1]) > self._max_message_bytes:
            # It would end the stream, and with it the requests of other clients.
            limit = int(self._max_message_bytes)
            raise ConnectionError(f"a message of {memory} bytes, it takes up to {limit}: use smaller micro-batches")
        reply = await self._ask(message)
        if reply.method is not Method.OK:
            raise ConnectionError(f"it says: {str(reply.fields.get('message'))[:300]}")

    async def _ask(self, message: Message) -> Message:
        if not self.is_open:
            raise ConnectionError("the stream to it ended")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        limit = _ANSWER_TIMEOUT + message.num_bytes / _SLOWEST
        try:
            # Messages of several frames go one after another; waiting for earlier ones is outside the time limit.
            async with self._long if message.num_bytes > CHUNK_BYTES else nullcontext(), asyncio.timeout(limit):
                await self._send(number, message)
            async with asyncio.timeout(limit):
                return await answer
        except TimeoutError:
            self.close("it does not take what is handed over")
            raise ConnectionError("it does not take what is handed over") from None
        finally:
            del self._answers[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # mark it as retrieved: the caller has received it

    async def _send(self, number: int, message: Message) -> None:
        try:
            await self._writer.send(number, message)
        except asyncio.CancelledError:
            if self.is_open:  # the server must not wait for the rest; sent before the next message begins
                for frame in Message(Method.CANCEL).frames(number):
                    self._stream.writelines(frame)
            raise

    def close(self, reason: str) -> None:
        self.is_open = False
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError(reason))
        if self._reading is not None and asyncio.current_task() is not self._reading:
            self._reading.cancel()
        self._writer.close()

    async def _read(self) -> None:
        try:
            while (item := await self._reader.next()) is not None:
                number, reply, _ = item
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(reply)
                elif number == 0:
                    break  # the server ends the stream; the message says why, and belongs to no request
            self.close("the stream to it ended")
        except ProtocolError as e:
            self.close(f"it breaks the protocol: {e}")


def _is_open(task: asyncio.Task[PeerLink]) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().is_open


def _end(task: asyncio.Task[PeerLink]) -> None:
    """Closes a link, even if it is still being opened."""

    def close(done: asyncio.Task[PeerLink]) -> None:
        if _is_open(done):
            done.result().close("the stream to it was closed")

    if task.done():
        close(task)
    else:
        task.add_done_callback(close)
