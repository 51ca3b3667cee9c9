"""The project's own server with blocks that take a stated time, as if it had a machine of its own.

    python -m benchmarks.throttled_server 20 serve MODEL --new-swarm ...      # 20 µs per block and position

A pass through n blocks of B samples of S positions ends when n·B·S times the stated time is over; its arithmetic, of a
tiny model, counts as part of that. The rest is slept, without the interpreter lock and without a core, so that several
such servers on a few cores behave like machines of their own. A backward takes as long as its forward: weights are
frozen, so only the gradients of activations are computed. Every block runs on all positions, also where one of each
sample is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.full_last_block import run_on_all_positions
from petals_lightning.cli.main import main
from petals_lightning.server.blocks.block_runner import BlockPass, BlockRunner
from petals_lightning.server.blocks.span import BlockSpan, SpanGraph


def throttle(seconds: float) -> None:
    """Makes every block of this process take at least `seconds` per position."""
    run, backward = BlockRunner.run, BlockSpan.backward

    @contextmanager
    def lasting(stated: float) -> Iterator[None]:
        began = time.perf_counter()
        yield
        time.sleep(max(0.0, stated - (time.perf_counter() - began)))

    def throttled_run(runner: BlockRunner, blocks: BlockPass, *args: Any, **padding: Any) -> torch.Tensor:
        batch, tokens, _ = blocks.hidden.shape
        with lasting(seconds * (blocks.end - blocks.start) * batch * tokens):
            return run(runner, blocks, *args, **padding)

    def throttled_backward(span: BlockSpan, graph: SpanGraph, *grads: Any) -> dict[str, torch.Tensor]:
        inputs = graph.inputs
        batch, tokens, _ = inputs.hidden.shape
        prefix = len(inputs.prefix) if inputs.prefix is not None else 0
        positions = batch * tokens + prefix if span.shares_prefix(prefix, tokens) else batch * (prefix + tokens)
        with lasting(seconds * (inputs.end - inputs.start) * positions):
            return backward(span, graph, *grads)

    run_on_all_positions()
    BlockRunner.run, BlockSpan.backward = throttled_run, throttled_backward  # type: ignore[method-assign, assignment]


def serve(microseconds: float) -> None:
    """`petals-lightning` with such blocks."""
    throttle(microseconds * 1e-6)
    torch.set_num_threads(1)
    main()


if __name__ == "__main__":
    serve(float(sys.argv.pop(1)))
