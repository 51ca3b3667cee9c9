"""Detects stalled uploads, which would otherwise hold their memory forever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WINDOW, LEAST_BYTES = 30.0, 240 << 10
"""Seconds of waiting in which at least so many bytes must arrive (8 KiB/s). They are fewer than a frame has."""
_TICK = 1.0  # seconds


class TimedReader:
    """Reads a stream and counts the seconds spent waiting. Only these count against the sender."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader = reader
        self.waited = 0.0
        """Seconds spent waiting in reads with a `check`."""

    async def exactly(self, count: int, check: Callable[[], None] | None = None) -> bytes:
        """Reads `count` bytes. Calls `check` after every second of waiting; it may raise. Without it, waits forever.

        Raises:
            asyncio.IncompleteReadError, ConnectionError: the stream ended first.
        """
        if check is None:
            return await self._reader.readexactly(count)
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_TICK):
                    return await self._reader.readexactly(count)
            except TimeoutError:
                pass
            finally:  # at most a tick: a process that was stopped did not wait
                self.waited += min(time.monotonic() - began, _TICK)
            check()


class UploadProgress:
    """Checks that one upload makes progress.

    Args:
        waited, received: the reader's counts when the upload began.
    """

    def __init__(self, waited: float, received: int = 0):
        self._since, self._had = waited, received

    def is_stalled(self, waited: float, received: int) -> bool:
        """Whether too few bytes arrived in the last window."""
        if waited - self._since < WINDOW:
            return False
        is_stalled = received - self._had < LEAST_BYTES
        self._since, self._had = waited, received
        return is_stalled


def stall_message(what: str) -> str:
    """The error message for the sender."""
    return f"{what} has stalled: less than {LEAST_BYTES >> 10} KiB came in {WINDOW:.0f} s"
