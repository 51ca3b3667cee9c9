"""What the fuzzers share: hostile clients beside a well-behaved one, what must hold at the end, and the report."""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import AutoModel

from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.server.blocks.self_checks import measure_past_shapes
from petals_lightning.server.blocks.span import BlockSpan
from tests.helpers.families import TINY_CONFIGS, save_tiny_checkpoint

PATIENCE = 20.0  # seconds after which the server counts as hung
INTS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1]


@dataclass
class Report:
    """What a run has seen."""

    inputs: int = 0
    replies: Counter[str] = field(default_factory=Counter)
    served: int = 0
    longest_wait: float = 0.0
    rss_growth: int = 0
    seconds: float = 0.0
    crashes: list[str] = field(default_factory=list)


@dataclass
class Budget:
    """Inputs that the hostile clients have left."""

    left: int


def make_span(folder: Path) -> BlockSpan:
    checkpoint = Checkpoint(str(save_tiny_checkpoint(TINY_CONFIGS["llama"](), folder)))
    model, layout, _ = load_pruned(
        model_class(AutoModel, checkpoint), checkpoint, ModelSlice(1, 3, with_embeddings_and_head=False)
    )
    span = BlockSpan(model, layout, 1)
    span.past_shapes = measure_past_shapes(span)
    return span


async def run_clients(
    report: Report,
    *,
    inputs: int,
    attackers: Sequence[Callable[[Budget], Awaitable[None]]],
    client: AbstractAsyncContextManager[Callable[[], Awaitable[torch.Tensor]]],
    num_open: Callable[[], int],
) -> None:
    """Runs hostile clients until they have made `inputs` inputs; raises AssertionError on a finding.

    Args:
        attackers: each runs until the budget is used.
        client: gives a call of the well-behaved client, which must have the same answer each time.
        num_open: how many calls or sessions the server has open; none may stay.
    """
    budget, stop = Budget(inputs), asyncio.Event()
    honest = asyncio.create_task(_behave(client, stop, report))
    began, process, early = time.monotonic(), psutil.Process(), 0

    async def measure() -> None:
        nonlocal early
        while budget.left > 0.8 * inputs:  # after a fifth: caches and allocators are warm
            await asyncio.sleep(0.02)
        early = process.memory_info().rss

    try:
        await asyncio.gather(measure(), *(attack(budget) for attack in attackers))
        stop.set()
        await honest
    finally:
        honest.cancel()
    deadline = time.monotonic() + PATIENCE
    while num_open() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not num_open(), f"{num_open()} hang"
    report.rss_growth = process.memory_info().rss - early
    report.seconds = time.monotonic() - began
    assert not report.crashes, report.crashes[:5]
    assert not report.replies["internal"], f"{report.replies['internal']} inputs ended in internal errors"


async def _behave(
    client: AbstractAsyncContextManager[Callable[[], Awaitable[torch.Tensor]]], stop: asyncio.Event, report: Report
) -> None:
    """A client as it should be."""
    expected = None
    async with client as ask:
        while not stop.is_set():
            began = time.monotonic()
            got = await asyncio.wait_for(ask(), PATIENCE)
            expected = got if expected is None else expected
            assert torch.equal(got, expected), "the well-behaved client was answered wrongly"
            report.served += 1
            report.longest_wait = max(report.longest_wait, time.monotonic() - began)
            await asyncio.sleep(0.01)


def main(description: str, run: Callable[..., Report]) -> None:
    """The command line of a fuzzer; `run(folder, inputs=…, seed=…)` is it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), inputs=arguments.inputs, seed=arguments.seed)
    print(f"{report.inputs} inputs in {report.seconds:.0f} s; replies: {dict(report.replies.most_common())}")
    print(f"a well-behaved client was served {report.served} times, at most after {report.longest_wait:.2f} s")
    print(f"memory grew by {report.rss_growth / 2**20:.1f} MiB after the first fifth; no crash, no hang, nothing left")
