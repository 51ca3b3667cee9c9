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


LOAD_AND_FREE = """
import psutil, sys, torch
from petals_lightning.hf import Checkpoint
from petals_lightning.server.loading import load_span
torch.empty(30 << 20, dtype=torch.uint8)  # freed: from here on glibc keeps what is smaller
load_span(Checkpoint(sys.argv[1]), 0, 1, devices=[torch.device("cpu")], dtype="float32", quant_type=sys.argv[2])
before = psutil.Process().memory_info().rss
tensors = [torch.ones((1 + 7 * (number % 2)) << 20, dtype=torch.uint8) for number in range(80)]
del tensors[1::2]  # those of 8 MiB
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc is told which tensors to map")
def test_large_tensors_of_a_quantised_server_leave_no_holes(tiny_checkpoint):
    """320 of 360 MiB are freed. In processes of their own: what glibc is told holds for the whole process."""
    grown = {}
    for quant_type in ("none", "int8"):
        command = [sys.executable, "-c", LOAD_AND_FREE, str(tiny_checkpoint("llama")), quant_type]
        grown[quant_type] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert grown["int8"] < 60 < 200 < grown["none"]
