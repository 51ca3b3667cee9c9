"""A call that came as a stream of protobufs: hivemind's framing, read within limits.

hivemind's own handlers allocate whatever length a message claims, read five messages ahead, and log a traceback for
every error of a client; so the few lines of the answering side are written here.

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
from petals_lightning.server.admission import Accounts
from petals_lightning.server.backend import Refusal

_READ_AHEAD = 2  # messages
_FAREWELL = 2.0  # seconds that a client has to read what ends its stream


class Charge:
    """What one call of a client costs while it is open: a request of its account, and bytes.

    Raises:
        Refusal: the client has too many requests open.
    """

    def __init__(self, accounts: Accounts, peer: str):
        account = accounts.open_request(peer)
        if account is None:
            raise Refusal(ErrorCode.OVERLOADED, "this client has as many requests open as it may have")
        self._accounts, self._account, self._peer = accounts, account, peer
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Raises Refusal if there is no room for so many bytes more."""
        if not self._accounts.reserve(self._account, num_bytes):
            raise Refusal(ErrorCode.OVERLOADED, f"no room for {num_bytes} bytes of this client's requests")
        self._num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._accounts.release(self._account, num_bytes)

    def close(self) -> None:
        self.release(self._num_bytes)
        self._accounts.close_request(self._peer)


@dataclass
class Arrival:
    """A message to be worked on; `release` gives back what it is charged with, and must be called."""

    message: ExpertRequest
    release: Callable[[], None] = field(default=lambda: None)
    pushed: bool = False


class CallStream:
    """The answering side of one call.

    Args:
        reader, writer: the stream.
        charge: of the call.
        max_message_bytes: of one message.
        idle_timeout: seconds that a client may let pass between messages.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        charge: Charge,
        *,
        max_message_bytes: int,
        idle_timeout: float,
    ):
        self._reader, self._writer, self.charge = reader, writer, charge
        self._max_bytes, self._idle_timeout = max_message_bytes, idle_timeout
        self._arrivals: asyncio.Queue[Arrival | Exception | None] = asyncio.Queue(_READ_AHEAD)

    async def read_on(self) -> None:
        """Reads messages until the client has gone; for a task beside the one that answers."""
        try:
            while True:
                kind = await self._reader.readexactly(1)
                length = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
                limit = self._max_bytes if kind == P2P.MESSAGE_MARKER else MAX_HEADER_BYTES
                if kind not in (P2P.MESSAGE_MARKER, P2P.ERROR_MARKER) or length > limit:
                    raise ProtocolError(f"a message of {length} bytes and kind {kind[0]}, the limit is {limit} bytes")
                if kind == P2P.ERROR_MARKER:
                    await self._reader.readexactly(length)
                    await self._arrivals.put(None)
                    continue
                self.charge.reserve(length)
                message = ExpertRequest.FromString(await self._reader.readexactly(length))
                await self._arrivals.put(Arrival(message, partial(self.charge.release, length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except DecodeError:
            await self._arrivals.put(ProtocolError("a message is no ExpertRequest"))
        except (ProtocolError, Refusal) as e:
            await self._arrivals.put(e)
        await asyncio.Future()  # the answer to this is under way; nothing more is read

    async def next(self) -> Arrival | None:
        """The next message; None at the end of the requests.

        Raises:
            ProtocolError, Refusal: the message breaks the format or a limit, or none came in time.
        """
        try:
            item = await asyncio.wait_for(self._arrivals.get(), self._idle_timeout)
        except TimeoutError as e:
            raise Refusal(ErrorCode.CACHE_LOST, f"nothing came for {self._idle_timeout:.0f} s") from e
        if isinstance(item, Exception):
            raise item
        return item

    def offer(self, arrival: Arrival) -> bool:
        """Puts a message in that came by another way; False if there is no place for it now."""
        if self._arrivals.full():
            return False
        self._arrivals.put_nowait(arrival)
        return True

    async def send(self, response: ExpertResponse) -> None:
        """Raises ConnectionError if the client has gone."""
        await _write(self._writer, P2P.MESSAGE_MARKER, response.SerializeToString())

    def close(self) -> None:
        """Gives back what waits unread; the tasks of the stream have ended."""
        while not self._arrivals.empty():
            if isinstance(item := self._arrivals.get_nowait(), Arrival):
                item.release()


async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ends the answer, and closes the stream when the client has read it.

    A daemon that sees its end closed may reset the stream while the last messages are under way. They are lost then,
    and Petals clients take what came for the whole answer.
    """
    try:
        with suppress(ConnectionError, TimeoutError):
            if not writer.is_closing():
                writer.write_eof()
                await asyncio.wait_for(_let_pass(reader), _FAREWELL)
    finally:
        writer.close()


async def end_with_error(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    """Says why a call ends, lets pass what the client still sends, so that it can read that, and closes the stream."""
    try:
        with suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(_say_farewell(reader, writer, text), _FAREWELL)
    finally:
        writer.close()


async def _say_farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> None:
    await _write(writer, P2P.ERROR_MARKER, RPCError(message=text).SerializeToString())
    await _let_pass(reader)


async def _let_pass(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def _write(writer: asyncio.StreamWriter, kind: bytes, body: bytes) -> None:
    if writer.is_closing():
        raise ConnectionResetError("the stream is closed")
    writer.write(kind + len(body).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
    writer.write(body)
    await writer.drain()
