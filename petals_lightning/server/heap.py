"""Gives memory that was freed back to the system, so that budgets hold for the process and not only for tensors."""

from __future__ import annotations

import ctypes
import time

_SHARE = 50  # a return may take 1 / _SHARE of the time


class HeapTrimmer:
    """For the thread that computes on a CPU.

    glibc keeps freed memory in its heap, between tensors that stay: graphs and caches of 512 MiB made the process 690
    MiB larger. Its own remedy, a system mapping for each tensor (`MALLOC_MMAP_THRESHOLD_`), made steps take 1.37 times
    as long. Does nothing where the C library is another one.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._next = 0.0

    def trim(self) -> None:
        """Returns what is free, unless that was done a moment ago; takes about 10 ms for each GiB in use."""
        began = time.monotonic()
        if self._trim is None or began < self._next:
            return
        self._trim(0)
        ended = time.monotonic()
        self._next = ended + _SHARE * (ended - began)
