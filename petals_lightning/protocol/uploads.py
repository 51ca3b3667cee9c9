"""Waits for what a peer uploads for as long as it moves: what stands still would hold its memory for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WINDOW, LEAST_BYTES = 30.0, 240 << 10
"""Seconds of waiting that must bring so many bytes (8 KiB/s). Less than a frame: what is too slow is one frame late."""
_TICK = 1.0  # seconds


class PatientReader:
    """Reads a stream, and counts the seconds for which it had to wait: only those are the sender's affair."""

    def __init__(self, reader: asyncio.StreamReader):
        self._reader = reader
        self.waited = 0.0
        """Seconds, of reads that had a `check`."""

    async def exactly(self, count: int, check: Callable[[], None] | None = None) -> bytes:
        """So many bytes. `check` is called every second of waiting, and may raise; without it there is no hurry.

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
            finally:  # no more than a tick at once: a process that was stopped has not waited
                self.waited += min(time.monotonic() - began, _TICK)
            check()


class Pace:
    """Whether one upload moves.

    Args:
        waited, received: the reader's counts when it began.
    """

    def __init__(self, waited: float, received: int = 0):
        self._since, self._had = waited, received

    def is_stalled(self, waited: float, received: int) -> bool:
        """Whether the last window brought too little."""
        if waited - self._since < WINDOW:
            return False
        is_stalled = received - self._had < LEAST_BYTES
        self._since, self._had = waited, received
        return is_stalled


def stalled(what: str) -> str:
    """What the sender is told."""
    return f"{what} stands still: less than {LEAST_BYTES >> 10} KiB came in {WINDOW:.0f} s"
