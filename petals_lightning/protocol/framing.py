"""Reads and writes messages as frames of a stream, within limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import (
    CHUNK_BYTES,
    FRAME_PREFIX,
    MAX_HEADER_BYTES,
    FrameKind,
    Message,
    Method,
    parse_header,
)
from petals_lightning.protocol.tensors import packed_size, unpack_tensors
from petals_lightning.protocol.uploads import WINDOW, TimedReader, UploadProgress, stall_message

Reserve = Callable[[int, int, Method, dict[str, Any]], str | None]
Release = Callable[[int, Method, dict[str, Any]], None]


@dataclass
class _Partial:
    method: Method
    fields: dict[str, Any]
    description: list[Any]
    size: int
    memory: int
    progress: UploadProgress
    body: bytearray | None = field(default_factory=bytearray)  # None: no memory was granted; the bytes are dropped
    refusal: str = ""
    charged: int = 0
    received: int = 0
    wire_bytes: int = 0


class MessageReader:
    """Reads messages, whose frames may be interleaved. Takes memory for arrived bytes, not for announced ones.

    Args:
        reader: the stream.
        max_message_bytes: limit of the memory that one message may announce, and all incomplete ones together.
        max_open: limit of incomplete messages.
        limit: by call id, a lower limit of the memory that a message may announce, or None.
        reserve: called with bytes, call id, method and fields before memory is taken for arrived bytes; the bytes
            include what unpacking will take. If it returns a reason, the message is delivered as `dropped` with that
            reason and no tensors. The caller releases reserved bytes, except those of incomplete messages, for which
            `release` is called.
        release: called with bytes, method and fields of a message that will never be complete.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        *,
        max_message_bytes: int,
        max_open: int,
        limit: Callable[[int], int | None] = lambda call_id: None,
        reserve: Reserve = lambda num_bytes, call_id, method, fields: None,
        release: Release = lambda num_bytes, method, fields: None,
    ):
        self._reader = TimedReader(reader)
        self._max_bytes, self._max_open = max_message_bytes, max_open
        self._limit, self._reserve, self._release = limit, reserve, release
        self._partial: dict[int, _Partial] = {}
        self.heard_at = time.monotonic()
        """When the last frame of any message arrived."""

    async def next(self) -> tuple[int, Message, int] | None:
        """The next complete message, as (call id, message, bytes on the wire); None at the end of the stream.

        Raises:
            ProtocolError: the bytes break the format or a limit, or have stalled. The stream cannot be read further.
        """
        while True:
            try:
                kind, call_id, header, chunk = await self._frame()
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            self.heard_at = time.monotonic()
            if (complete := self._accept(kind, call_id, header, chunk)) is not None:
                return call_id, *complete
            self._check_progress()

    async def _frame(self) -> tuple[int, int, bytes, memoryview]:
        """The next frame: kind, call id, header and chunk."""
        prefix = await self._reader.exactly(FRAME_PREFIX.size, self._check_progress if self._partial else None)
        kind, call_id, header_length, chunk_length = FRAME_PREFIX.unpack(prefix)
        if header_length > MAX_HEADER_BYTES or chunk_length > CHUNK_BYTES:
            raise ProtocolError(f"a frame of {header_length} + {chunk_length} bytes is over the limit")
        began = self._reader.waited

        def check() -> None:
            self._check_progress()
            if self._reader.waited >= began + WINDOW:
                raise ProtocolError(stall_message(f"a frame of call {call_id}"))

        data = await self._reader.exactly(header_length + chunk_length, check)
        return kind, call_id, data[:header_length], memoryview(data)[header_length:]

    def _check_progress(self) -> None:
        for call_id, partial in self._partial.items():
            if partial.progress.is_stalled(self._reader.waited, partial.received):
                raise ProtocolError(stall_message(f"the message of call {call_id}"))

    def _accept(self, kind: int, call_id: int, header: bytes, chunk: memoryview) -> tuple[Message, int] | None:
        if kind == FrameKind.HEAD:
            partial = self._begin(call_id, header)
        elif kind == FrameKind.MORE and call_id in self._partial and not header:
            partial = self._partial[call_id]
        else:
            raise ProtocolError(f"unexpected frame of kind {kind} for call {call_id}")
        partial.wire_bytes += FRAME_PREFIX.size + len(header) + len(chunk)
        partial.received += len(chunk)
        if partial.received > partial.size:
            raise ProtocolError(f"call {call_id} sends more bytes than it announced")
        if len(chunk) and partial.body is not None:
            due = partial.memory * partial.received // partial.size - partial.charged
            if (refusal := self._reserve(due, call_id, partial.method, partial.fields)) is None:
                partial.charged += due
                partial.body += chunk
            else:
                partial.refusal = refusal
                self._free(partial)
        if partial.received < partial.size:
            return None
        del self._partial[call_id]
        if partial.body is None:
            return Message(partial.method, partial.fields, dropped=partial.refusal), partial.wire_bytes
        tensors = unpack_tensors(partial.description, partial.body)
        return Message(partial.method, partial.fields, tensors, reserved=partial.memory), partial.wire_bytes

    def _begin(self, call_id: int, header: bytes) -> _Partial:
        method, fields, description = parse_header(header)
        if call_id in self._partial:
            if method is not Method.CANCEL:
                raise ProtocolError(f"two messages under call id {call_id}")
            self._free(self._partial.pop(call_id))  # its sender cancelled it in the middle
        size, memory = packed_size(description)
        under_way = sum(partial.memory for partial in self._partial.values() if partial.body is not None)
        if len(self._partial) >= self._max_open or under_way + memory > self._max_bytes:
            raise ProtocolError(f"a message of {memory} bytes is over this peer's limit of {self._max_bytes} bytes")
        if (limit := self._limit(call_id)) is not None and memory > limit:
            raise ProtocolError(f"call {call_id} announces {memory} bytes, {limit} are the most that were asked for")
        partial = _Partial(method, fields, description, size, memory, UploadProgress(self._reader.waited))
        self._partial[call_id] = partial
        return partial

    def abandon(self) -> None:
        """Drops incomplete messages. Call it when the stream has ended."""
        while self._partial:
            self._free(self._partial.popitem()[1])

    def _free(self, partial: _Partial) -> None:
        partial.body = None
        if partial.charged:  # else `reserve` was never called for it
            self._release(partial.charged, partial.method, partial.fields)
            partial.charged = 0


class MessageWriter:
    """Writes messages from many tasks on one stream.

    Messages of several frames are sent one after another, so that on a slow link the receiver can start on the first
    one while the others are still being sent. Messages of one frame are sent between those frames.
    """

    def __init__(self, writer: asyncio.StreamWriter):
        self._writer = writer
        self._turn, self._long = asyncio.Lock(), asyncio.Lock()
        self.wrote_at = time.monotonic()
        """When the stream last took a frame of tensors. A stream that takes frames is alive, however slow."""

    async def send(self, call_id: int, message: Message) -> int:
        """Sends a message and returns the bytes written. Raises ConnectionError if the stream has ended."""
        if message.num_bytes <= CHUNK_BYTES:
            return await self._send(call_id, message)
        async with self._long:
            return await self._send(call_id, message)

    async def _send(self, call_id: int, message: Message) -> int:
        num_bytes = 0
        for frame in message.frames(call_id):
            async with self._turn:  # asyncio's locks are fair: first come, first served
                if self._writer.is_closing():
                    raise ConnectionResetError("the stream is closed")
                self._writer.writelines(frame)
                await self._writer.drain()
                if message.tensors:
                    self.wrote_at = time.monotonic()
            num_bytes += sum(len(buffer) for buffer in frame)
        return num_bytes

    def close(self) -> None:
        self._writer.close()
