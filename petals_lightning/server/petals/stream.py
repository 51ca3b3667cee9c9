"""A call that comes as a stream of protobufs: hivemind's framing, read within limits.

hivemind's own handlers allocate whatever length a message claims, read five messages ahead, and log a traceback for
every error of a client. So the answering side is written here.

    message := marker u8 (0 message, 1 error or, if empty, the end of the requests) · length u64 · protobuf
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from google.protobuf.message import DecodeError
from hivemind.p2p import P2P
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import MAX_HEADER_BYTES, ErrorCode
from petals_lightning.protocol.petals.wire import REQUEST
from petals_lightning.protocol.uploads import TimedReader, UploadProgress, stall_message
from petals_lightning.server.access.quotas import Quotas
from petals_lightning.server.refusal import Refusal

_READ_AHEAD = 2  # messages
_PIECE_BYTES = 1 << 18
_COPIES = 3  # of a message while it is parsed: as received, as bytes, and parsed
_FAREWELL = 2.0  # seconds that a client has to read the last message of its stream


class Charge:
    """What one open call is charged: one of its client's requests, bytes, and maybe a stream.

    Raises:
        Refusal: the client or the server has too many open.
    """

    def __init__(self, quotas: Quotas, peer: str, *, has_stream: bool = False):
        usage = quotas.open_call(peer) if has_stream else quotas.open_request(peer)
        if isinstance(usage, str):
            raise Refusal(ErrorCode.OVERLOADED, usage)
        self._quotas, self._usage, self._peer, self._has_stream = quotas, usage, peer, has_stream
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Counts more bytes. Raises Refusal if they do not fit."""
        if (reason := self._quotas.reserve(self._usage, num_bytes)) is not None:
            raise Refusal(ErrorCode.OVERLOADED, f"no room: {reason}")
        self._num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._quotas.release(self._usage, num_bytes)

    def close(self) -> None:
        self.release(self._num_bytes)
        if self._has_stream:
            self._quotas.close_stream(self._peer)
        self._quotas.close_request(self._peer)


@dataclass
class Arrival:
    """A message to answer. `release` gives back the bytes that it is charged with, and must be called."""

    message: ExpertRequest
    release: Callable[[], None] = field(default=lambda: None)
    pushed: bool = False


class CallStream:
    """The answering side of one call.

    Args:
        reader, writer: the stream.
        charge: of the call.
        max_message_bytes: of one message.
        idle_timeout: seconds that may pass between messages; None: they are one upload, which must not stall.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        charge: Charge,
        *,
        max_message_bytes: int,
        idle_timeout: float | None,
    ):
        self._reader, self._writer, self.charge = TimedReader(reader), writer, charge
        self._max_bytes, self._idle_timeout = max_message_bytes, idle_timeout
        self._arrivals: asyncio.Queue[Arrival | Exception | None] = asyncio.Queue(_READ_AHEAD)
        self._received, self._progress = 0, UploadProgress(0.0)
        self._is_complete = False

    async def read_on(self) -> None:
        """Reads messages until the client leaves. Runs in a task of its own, next to the one that answers."""
        try:
            while True:
                await self._read_one()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except DecodeError:
            await self._arrivals.put(ProtocolError("a message is not an ExpertRequest"))
        except (ProtocolError, Refusal) as e:
            await self._arrivals.put(e)
        await asyncio.Future()  # reads nothing more while this error is answered

    async def _read_one(self) -> None:
        is_upload = self._idle_timeout is None and not self._is_complete
        kind = await self._reader.exactly(1, self._check_progress if is_upload else None)
        if not is_upload:
            self._progress = UploadProgress(self._reader.waited, self._received)
        length = int.from_bytes(await self._exactly(P2P.HEADER_LEN), P2P.BYTEORDER)
        limit = self._max_bytes if kind == P2P.MESSAGE_MARKER else MAX_HEADER_BYTES
        if kind not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER) or length > limit:
            raise ProtocolError(f"a message of {length} bytes and kind {kind[0]}, the limit is {limit} bytes")
        if kind == P2P.ERROR_MARKER:
            await self._exactly(length)
            self._is_complete = True
            await self._arrivals.put(None)
            return
        data = bytearray()
        try:
            while len(data) < length:
                piece = await self._exactly(min(length - len(data), _PIECE_BYTES))
                self.charge.reserve(_COPIES * len(piece))
                data += piece
            message = REQUEST.FromString(bytes(data))
        except BaseException:
            self.charge.release(_COPIES * len(data))
            raise
        self.charge.release((_COPIES - 1) * length)
        data.clear()  # frees it while the message waits for its turn
        await self._arrivals.put(Arrival(message, partial(self.charge.release, length)))

    async def _exactly(self, count: int) -> bytes:
        data = await self._reader.exactly(count, self._check_progress)
        self._received += len(data)
        self._check_progress()
        return data

    def _check_progress(self) -> None:
        if self._progress.is_stalled(self._reader.waited, self._received):
            raise ProtocolError(stall_message("this call"))

    async def next(self) -> Arrival | None:
        """The next message; None at the end of the requests.

        Raises:
            ProtocolError, Refusal: the message breaks the format or a limit, or came too late.
        """
        try:
            item = await asyncio.wait_for(self._arrivals.get(), self._idle_timeout)
        except TimeoutError as e:
            assert self._idle_timeout is not None
            raise Refusal(ErrorCode.CACHE_LOST, f"nothing came for {self._idle_timeout:.0f} s") from e
        if isinstance(item, Exception):
            raise item
        return item

    def offer(self, arrival: Arrival) -> bool:
        """Adds a message that another server pushed; False if the queue is full."""
        if self._arrivals.full():
            return False
        self._arrivals.put_nowait(arrival)
        return True

    async def send(self, response: ExpertResponse) -> None:
        """Sends a response. Raises ConnectionError if the client has left."""
        await _write(self._writer, P2P.MESSAGE_MARKER, response.SerializeToString())

    def close(self) -> None:
        """Releases messages that were not read. Call it when the stream's tasks have ended."""
        while not self._arrivals.empty():
            if isinstance(item := self._arrivals.get_nowait(), Arrival):
                item.release()


async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ends the answer, and closes the stream when the client has read it.

    A daemon whose end is closed may reset the stream while the last messages are on their way. They would be lost, and
    Petals clients take what they have received for the whole answer.
    """
    try:
        with suppress(ConnectionError, TimeoutError):
            if not writer.is_closing():
                writer.write_eof()
                await asyncio.wait_for(_drop_input(reader), _FAREWELL)
    finally:
        writer.close()


async def end_with_error(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    """Sends an error and closes the stream. Drops what the client still sends, so that it can read the error."""
    try:
        with suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(_say_farewell(reader, writer, text), _FAREWELL)
    finally:
        writer.close()


async def _say_farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    await _write(writer, P2P.ERROR_MARKER, RPCError(message=text).SerializeToString())
    await _drop_input(reader)


async def _drop_input(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def _write(writer: asyncio.StreamWriter, kind: bytes, body: bytes) -> None:
    if writer.is_closing():
        raise ConnectionResetError("the stream is closed")
    writer.write(kind + len(body).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
    writer.write(body)
    await writer.drain()
