"""What a hostile peer can send to a server, over raw streams; and what it costs the server's process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgpack
import psutil
from hivemind.p2p import P2PHandlerError, PeerID

from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import CHUNK_BYTES, FRAME_PREFIX, STREAM_METHOD, FrameKind, Message
from petals_lightning.protocol.petals.methods import method_name
from petals_lightning.swarm import SwarmNode
from petals_lightning.swarm.streams import open_stream

PATIENCE = 60.0


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    return psutil.Process(pid).memory_info().rss


def announcement(call_id: int, num_bytes: int, method: str = "forward", **fields: Any) -> bytes:
    """The first frame of a message of so many bytes, without any of them."""
    header = msgpack.packb({"m": method, "f": fields, "t": [["hidden", "bool", [num_bytes]]]})
    return FRAME_PREFIX.pack(FrameKind.HEAD, call_id, len(header), 0) + header


def piece(call_id: int, num_bytes: int = CHUNK_BYTES) -> bytes:
    """A frame with so many further bytes of a message."""
    return FRAME_PREFIX.pack(FrameKind.MORE, call_id, 0, num_bytes) + b"\1" * num_bytes


class RawStream:
    """A stream of ours to a server; its replies are read in the background."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.writer, self._messages = writer, MessageWriter(writer)
        self._replies = MessageReader(reader, max_message_bytes=1 << 28, max_open=1000)

    async def write(self, *frames: bytes) -> None:
        for frame in frames:
            self.writer.write(frame)
            await self.writer.drain()

    async def send(self, call_id: int, message: Message) -> None:
        await self._messages.send(call_id, message)

    async def reply(self) -> Message | None:
        """The next message from the server; None where it has ended the stream."""
        item = await asyncio.wait_for(self._replies.next(), PATIENCE)
        return item[1] if item is not None else None

    async def ask(self, call_id: int, message: Message) -> Message:
        await self.send(call_id, message)
        reply = await self.reply()
        assert reply is not None, "the stream ended without a word"
        return reply


class Attacker:
    """A peer with an identity of its own, which speaks to one server.

    Args:
        server: a `ServerProcess` that is ready, or a `Victim`.
    """

    def __init__(self, server: Any):
        self.node, self._server = SwarmNode([server.maddr], host_maddrs=(), client_mode=True).start(), server.peer_id
        self._writers: list[asyncio.StreamWriter] = []

    def run(self, coroutine: Any) -> Any:
        return self.node.run(coroutine)

    async def stream(self) -> RawStream:
        return RawStream(*await self._open(STREAM_METHOD))

    async def petals_stream(self, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self._open(method_name(method))

    async def petals_unary(self, method: str, request: bytes) -> str:
        """What the server answers to a unary call with these bytes, which is an error."""
        try:
            await self.node.p2p._client.call_unary_handler(
                PeerID.from_base58(self._server), method_name(method), request
            )
        except P2PHandlerError as e:
            return str(e)
        raise AssertionError("it was answered")

    def close(self) -> None:
        async def close_streams() -> None:
            for writer in self._writers:
                writer.close()

        self.run(close_streams())
        self.node.close()

    async def _open(self, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await open_stream(self.node.p2p, self._server, method)
        self._writers.append(writer)
        return reader, writer


def petals_announcement(num_bytes: int) -> bytes:
    """The beginning of a Petals message of so many bytes."""
    return b"\0" + num_bytes.to_bytes(8, "big")


def empty_tensors(count: int) -> bytes:
    """A Petals request of two bytes a tensor, each of which becomes an object."""
    return b"\x12\x00" * count


async def upload(stream: RawStream, calls: Sequence[int], num_bytes: int) -> None:
    """Sends all of these messages but their last frames, so that they stay under way."""
    for call_id in calls:
        await stream.write(announcement(call_id, num_bytes))
        for _ in range(num_bytes // CHUNK_BYTES - 1):
            await stream.write(piece(call_id))
