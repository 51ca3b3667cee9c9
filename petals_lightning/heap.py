"""Returns freed memory to the system, so that budgets hold for the whole process and not only for tensors."""

from __future__ import annotations

import ctypes
import resource
import time
from pathlib import Path

_GROWTH, _PERIOD = 4 << 20, 0.1  # bytes, seconds
_LARGE = 4 << 20  # bytes of a tensor that gets a mapping of its own
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_STATM = Path("/proc/self/statm")
_LIBC = ctypes.CDLL(None) if _STATM.exists() else None
_TRIM, _MALLOPT = getattr(_LIBC, "malloc_trim", None), getattr(_LIBC, "mallopt", None)


def trim_heap() -> None:
    """Returns all free memory, in about 10 ms; use it after much was freed at once."""
    if _TRIM is not None:
        _TRIM(0)


def map_large_tensors() -> None:
    """From now on, returns each tensor of 4 MiB or more to the system as soon as it is freed.

    By default glibc raises this limit up to 32 MiB as memory is freed. The weights that a quantised block unpacks for a
    pass then leave holes in the heap, between activations that stay: 45 MiB for each block of 8B shape. Passes take
    0.97 to 1.04 times as long (docs/measuring-log.md). Does nothing with another C library.
    """
    if _MALLOPT is not None:
        _MALLOPT(_MMAP_THRESHOLD, _LARGE)


class HeapTrimmer:
    """Trims the heap when the process has grown. For the compute threads of a CPU server.

    glibc keeps freed memory in its heap, between tensors that stay: graphs and caches of 512 MiB made the process 690
    MiB larger. Its own remedy, a system mapping for each tensor (`MALLOC_MMAP_THRESHOLD_`), made steps take 1.37 times
    as long. Does nothing with another C library.

    Not locked: if two threads check at the same time, the heap is trimmed twice.
    """

    def __init__(self) -> None:
        self._largest, self._checked_at = 0, 0.0

    def trim(self) -> None:
        """Trims the heap if the process is larger than at any earlier check. That bounds how often it takes 10 ms."""
        if _TRIM is None or (now := time.monotonic()) < self._checked_at + _PERIOD:
            return
        self._checked_at = now
        if (size := _resident_bytes()) >= self._largest + _GROWTH:
            trim_heap()
            self._largest = size


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()
