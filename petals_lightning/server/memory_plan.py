"""How many blocks a device's memory holds beside what their clients may take."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from petals_lightning.errors import ConfigurationError
from petals_lightning.heap import trim_heap
from petals_lightning.server.config import ServerConfig

_CONTAINER = Path("/sys/fs/cgroup")
_RESERVE = 1 / 10  # of the free memory: for the request that is being computed, and for fragmentation
_BUDGETS = {"graph_bytes": "graphs", "cache_bytes": "keys and values", "max_total_bytes": "requests"}
_DEFAULT_BUDGET = 1 / 8  # of the free memory: the most that a budget takes which nobody has set


@dataclass(frozen=True)
class MemoryPlan:
    """What the free memory of a device is used for, in bytes.

    Attributes:
        free: what there is.
        total_blocks: of the model.
        num_blocks: as many of them as fit, wherever they are in the model.
        weights: of so many blocks, at most.
        budgets: what clients may take, by the name of the setting. Requests wait in the host's memory, so a GPU's has
            no budget for them.
        reserve: what is left alone.
    """

    free: int
    total_blocks: int
    num_blocks: int
    weights: int
    budgets: dict[str, Any]
    reserve: int

    def applied_to(self, config: ServerConfig) -> ServerConfig:
        """The settings with the plan's number of blocks and budgets."""
        return replace(config, num_blocks=self.num_blocks, **self.budgets)

    def __str__(self) -> str:
        parts = {f"weights of {self.num_blocks} of {self.total_blocks} blocks": self.weights}
        parts |= {_BUDGETS[name]: num_bytes for name, num_bytes in self.budgets.items()} | {"reserve": self.reserve}
        written = ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in parts.items())
        return f"{_gib(self.free)} GiB are free; {written}"


def plan_memory(block_bytes: Sequence[int], config: ServerConfig, free: int, *, is_gpu: bool) -> MemoryPlan:
    """Divides free memory between blocks and the budgets of clients.

    A budget that has its default is made smaller where memory is short; one that the user has chosen is kept.

    Args:
        block_bytes: of each block of the model.
        config: with the budgets.
        free: bytes of the device.

    Raises:
        ConfigurationError: not even one block fits.
    """
    defaults = {each.name: each.default for each in fields(config)}
    budgets = {name: getattr(config, name) for name in _BUDGETS if not (is_gpu and name == "max_total_bytes")}
    for name, value in budgets.items():
        if value == defaults[name]:
            budgets[name] = min(value, int(free * _DEFAULT_BUDGET))
    reserve, total = int(free * _RESERVE), len(block_bytes)
    room = free - reserve - sum(budgets.values())
    count = max(n for n in range(total + 1) if _largest(block_bytes, n) <= max(room, 0))
    plan = MemoryPlan(free, total, count, _largest(block_bytes, count), budgets, reserve)
    if not count:
        raise ConfigurationError(
            f"not one block fits, each takes {_gib(max(block_bytes))} GiB: {plan}. Use --dtype bfloat16, "
            "--quant-type nf4, smaller budgets (--graph-memory, --cache-memory), or a device with more memory"
        )
    return plan


def split_blocks(block_bytes: Sequence[int], free: Sequence[int]) -> list[int]:
    """The device of each of consecutive blocks, so that weights are shared out by free memory, in order.

    Args:
        block_bytes: of each block.
        free: bytes of each device.
    """
    shares = [sum(free[: number + 1]) / sum(free) for number in range(len(free))]
    total, before, devices = sum(block_bytes), 0, []
    for size in block_bytes:
        middle = (before + size / 2) / total
        devices.append(next(number for number, share in enumerate(shares) if middle <= share or share == shares[-1]))
        before += size
    return devices


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device: of the GPU, or of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used, parts = (
            (_CONTAINER / name).read_text().strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:  # not in a container, or in one of an older kind
        return free
    # Pages of files count as used, though the kernel takes them back when they are needed.
    files = sum(
        int(line.split()[1]) for line in parts.splitlines() if line.startswith(("active_file", "inactive_file"))
    )
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + files))


def give_back_memory() -> None:
    """Returns to devices and system what is held for objects that nobody uses any more."""
    gc.collect()
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _largest(block_bytes: Sequence[int], count: int) -> int:
    """Bytes of the largest `count` consecutive blocks."""
    return max(sum(block_bytes[start : start + count]) for start in range(len(block_bytes) - count + 1))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g}"
