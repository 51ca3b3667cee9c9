"""A server's limits for one stream: how many requests may be open, and how many bytes they may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class RequestWindow:
    """Holds requests back until they fit the server's limits; first come, first served.

    Args:
        max_requests, max_bytes: the server's limits. A request larger than `max_bytes` is sent when no other is
            open, and the server refuses it with its own message.
    """

    def __init__(self, max_requests: int, max_bytes: int):
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._requests = self._bytes = 0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def enter(self, num_bytes: int) -> AsyncIterator[None]:
        async with self._turn, self._changed:
            await self._changed.wait_for(lambda: self._fits(num_bytes))
            self._requests, self._bytes = self._requests + 1, self._bytes + num_bytes
        try:
            yield
        finally:
            self._requests, self._bytes = self._requests - 1, self._bytes - num_bytes
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        if not self._requests:
            return True
        return self._requests < self._max_requests and self._bytes + num_bytes <= self._max_bytes
