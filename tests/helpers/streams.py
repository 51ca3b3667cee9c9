"""A client's stream to a server, over a local socket."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import torch

from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import Message
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.server.access.limits import ServerLimits
from tests.helpers.families import HIDDEN

LIMITS = ServerLimits(max_batch_tokens=64, max_message_bytes=8 << 20, max_open_requests=4)


class Client:
    """The other end of a stream, over a local socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = MessageReader(reader, max_message_bytes=1 << 30, max_open=100)
        self.writer = MessageWriter(writer)
        self._ids = itertools.count(1)

    async def ask(self, message: Message) -> Message:
        call_id = next(self._ids)
        await self.writer.send(call_id, message)
        got_id, reply, _ = await self.next()
        assert got_id == call_id
        return reply

    async def next(self) -> Any:
        return await asyncio.wait_for(self._reader.next(), 30)


def forward(**changes: Any) -> Message:
    return ForwardRequest(**{"start": 1, "end": 3, "hidden": torch.ones(2, 3, HIDDEN), **changes}).to_message()
