"""What was freed leaves the process."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from petals_lightning.heap import HeapTrimmer

MIB = 1 << 20


def resident() -> float:
    return psutil.Process().memory_info().rss / MIB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc is told to return memory")
def test_holes_between_tensors_that_stay_are_given_back():
    HeapTrimmer().trim()
    before = resident()
    tensors = [torch.ones(100 << 8) for _ in range(2000)]  # 100 KiB each, which glibc takes from its heap
    assert resident() > before + 150
    kept = tensors[::4]
    del tensors
    HeapTrimmer().trim()
    assert resident() < before + 100, f"{len(kept)} tensors take 50 MiB"
