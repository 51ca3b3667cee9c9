"""What was freed leaves the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

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


UNPACK = """
import psutil, sys, torch
from petals_lightning.heap import map_large_tensors
torch.empty(30 << 20, dtype=torch.uint8)  # freed: from here on glibc keeps what is smaller
if sys.argv[1] == "mapped":
    map_large_tensors()
before = psutil.Process().memory_info().rss
tensors = [torch.ones((1 + 7 * (number % 2)) << 20, dtype=torch.uint8) for number in range(80)]
del tensors[1::2]  # those of 8 MiB
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc is told which tensors to map")
def test_unpacked_weights_leave_no_holes_between_activations():
    """40 MiB stay. In processes of their own, since what is told to glibc holds for the whole process."""
    grown = {
        how: int(subprocess.run([sys.executable, "-c", UNPACK, how], capture_output=True, text=True, check=True).stdout)
        for how in ("by itself", "mapped")
    }
    assert grown["mapped"] < 60 < 200 < grown["by itself"]
