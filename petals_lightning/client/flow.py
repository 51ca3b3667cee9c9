"""Keeps a client within what a server grants it: requests and bytes open on one stream at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

_REQUESTS, _BYTES = 32, 512 << 20  # where the server does not say what it grants


class FlowControl:
    """Requests wait here, first come, first served, until there is room for them.

    Half of what is granted is used: the server counts a request until its answer is written, which is a little longer
    than we do, and this client may have a second stream.
    """

    def __init__(self) -> None:
        self._max_requests, self._max_bytes = _REQUESTS, _BYTES
        self._requests = self._bytes = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._sizes: dict[asyncio.Future[None], int] = {}
        self._closed = False

    def grant(self, info: dict[str, Any]) -> None:
        """Takes the limits from a server's `info`."""
        requests, num_bytes = info.get("max_open_requests"), info.get("max_client_bytes")
        if isinstance(requests, int) and isinstance(num_bytes, int):
            self._max_requests, self._max_bytes = max(1, requests // 2), max(1, num_bytes // 2)

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Waits until a request of `num_bytes` may be sent, and counts it inside."""
        if self._queue or not self._fits(num_bytes):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            self._sizes[turn] = num_bytes
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._free(num_bytes)  # its turn had come in the same moment
                raise
            finally:
                if self._sizes.pop(turn, None) is not None:
                    self._queue.remove(turn)
                    self._admit()
        else:
            self._take(num_bytes)
        try:
            yield
        finally:
            self._free(num_bytes)

    def close(self) -> None:
        """Lets all who wait go on: the stream has ended, and they will see it."""
        self._closed = True
        self._admit()

    def _fits(self, num_bytes: int) -> bool:
        alone = self._requests == 0  # a request larger than the limit must be refused by the server, not wait forever
        has_room = self._requests < self._max_requests and self._bytes + num_bytes <= self._max_bytes
        return self._closed or alone or has_room

    def _take(self, num_bytes: int) -> None:
        self._requests, self._bytes = self._requests + 1, self._bytes + num_bytes

    def _free(self, num_bytes: int) -> None:
        self._requests, self._bytes = self._requests - 1, self._bytes - num_bytes
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            turn = self._queue[0]
            if turn.done():  # cancelled, and not yet away
                self._queue.popleft()
                self._sizes.pop(turn, None)
            elif self._fits(self._sizes[turn]):
                self._queue.popleft()
                self._take(self._sizes.pop(turn))
                turn.set_result(None)
            else:
                return
