"""Gives memory that was freed back to the system, so that budgets hold for the process and not only for tensors."""

from __future__ import annotations

import ctypes
import resource
import time
from pathlib import Path

_GROWTH, _PERIOD = 4 << 20, 0.1  # bytes, seconds
_STATM = Path("/proc/self/statm")
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATM.exists() else None


def give_back() -> None:
    """Returns what is free, in about 10 ms; for when much was freed at once."""
    if _TRIM is not None:
        _TRIM(0)


class HeapTrimmer:
    """For the threads that compute on a CPU; if two look at once, it is trimmed twice.

    glibc keeps freed memory in its heap, between tensors that stay: graphs and caches of 512 MiB made the process 690
    MiB larger. Its own remedy, a system mapping for each tensor (`MALLOC_MMAP_THRESHOLD_`), made steps take 1.37 times
    as long. Does nothing where the C library is another one.
    """

    def __init__(self) -> None:
        self._largest, self._looked_at = 0, 0.0

    def trim(self) -> None:
        """Returns what is free if the process is larger than at any look before: so not again and again (10 ms)."""
        if _TRIM is None or (now := time.monotonic()) < self._looked_at + _PERIOD:
            return
        self._looked_at = now
        if (size := _resident_bytes()) >= self._largest + _GROWTH:
            give_back()
            self._largest = size


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
