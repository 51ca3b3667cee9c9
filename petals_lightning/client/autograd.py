"""Remote blocks as one node of the autograd graph: splits a batch into micro-batches and runs them concurrently.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, L blocks, N positions that are read.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from petals_lightning.client.pipeline import Pipeline
from petals_lightning.client.segments import ForwardResult, MicroBatch
from petals_lightning.protocol.adapters import Adapter, sum_of
from petals_lightning.swarm import SwarmNode


@dataclass
class _Part:
    """One micro-batch: samples [first, last) of the batch, and where its positions are among all that are read."""

    batch: MicroBatch
    first: int
    last: int
    result: ForwardResult | None = None
    row_positions: torch.Tensor | None = None


class RemoteRunner:
    """Runs blocks for autograd. Callable from any thread; blocks until the swarm has answered."""

    def __init__(self, node: SwarmNode, pipeline: Pipeline):
        self._node, self._pipeline = node, pipeline
        self._recent: list[Adapter] = []
        self._versions, self._lock = itertools.count(1), threading.Lock()

    def versioned(self, adapter: Adapter) -> Adapter:
        """A copy of the adapter with a version that changes only when its values do, so that it is sent once.

        The last two are known: a step may have a pass with the tuning, which changes, and one without.
        """
        adapter = adapter.map(lambda tensor: tensor.detach().cpu())
        with self._lock:
            known = next((recent for recent in self._recent if recent.is_same(adapter)), None)
            if known is None:
                known = replace(adapter.map(torch.clone), version=next(self._versions))
            self._recent = [known, *(recent for recent in self._recent if recent is not known)][:2]
            return known

    def split(
        self,
        hidden: torch.Tensor,
        prefix: torch.Tensor | None,
        rows: torch.Tensor | None,
        adapter: Adapter | None,
        *,
        start: int,
        size: int,
        input_grad: bool,
        keep: bool,
    ) -> list[_Part]:
        """Splits the batch into micro-batches of `size` samples."""
        batch_size, tokens, _ = hidden.shape
        parts: list[_Part] = []
        for first in range(0, batch_size, size):
            last = min(first + size, batch_size)
            own_rows = positions = None
            if rows is not None:
                positions = ((rows >= first * tokens) & (rows < last * tokens)).nonzero().squeeze(1)
                if not len(positions):
                    continue  # no output of these samples is read, so they need not run
                own_rows = (rows[positions] - first * tokens).to(torch.int32)
            micro_batch = MicroBatch(start, hidden[first:last], prefix, own_rows, adapter, input_grad, keep)
            parts.append(_Part(micro_batch, first, last, row_positions=positions))
        return parts

    def forward(self, parts: list[_Part], end: int, *, want_prefix: bool) -> None:
        """Runs all micro-batches through blocks up to `end` and stores their results."""

        async def run() -> list[ForwardResult]:
            return await _gather(self._pipeline.forward(part.batch, end, want_prefix=want_prefix) for part in parts)

        for part, result in zip(parts, self._node.run(run()), strict=True):
            part.result = result

    def past(self, prefix: torch.Tensor, past: Adapter) -> None:
        """See `Pipeline.past`."""
        self._node.run(self._pipeline.past(prefix.detach().cpu(), past))

    def backward(
        self, parts: list[_Part], grads: list[torch.Tensor], grad_prefix: torch.Tensor | None
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None, Adapter | None]:
        """Gradients of hidden (per micro-batch), and of the prefix and the adapter (summed over micro-batches)."""

        async def run() -> list[Any]:
            calls = []
            for index, (part, grad) in enumerate(zip(parts, grads, strict=True)):
                assert part.result is not None
                # All micro-batches return the same prefix. The first one's is used, so it gets the gradient.
                own = grad_prefix if index == 0 else None
                calls.append(self._pipeline.backward(part.batch, part.result, grad, own))
            return await _gather(calls)

        results = self._node.run(run())
        prefix_grads = [result.prefix.float() for result in results if result.prefix is not None]
        adapter_grads = [result.adapter for result in results if result.adapter is not None]
        return (
            [result.hidden for result in results],
            torch.stack(prefix_grads).sum(0) if prefix_grads else None,
            sum_of(adapter_grads) if adapter_grads else None,
        )


class RemoteBlocks(torch.autograd.Function):
    """`apply(runner, start, end, size, want_prefix, rows, adapter, hidden, prefix, *tensors)` → (hidden, prefix).

    size: samples of a micro-batch. tensors: those of the adapter, which autograd sees in this form only.
    hidden [B, S, H] → the same shape, or [N, H] with rows [N]. prefix [P, H] → the same shape, or empty if not wanted.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        runner, start, end, size, want_prefix, rows, adapter, hidden, prefix, *_ = args
        leaves = {"hidden": hidden, "prefix": prefix} | (adapter.tensors() if adapter is not None else {})
        needs = dict(zip(leaves, ctx.needs_input_grad[7:], strict=True))
        parts = runner.split(
            hidden.detach().cpu(),
            prefix.detach().cpu() if prefix is not None else None,
            rows.detach().cpu() if rows is not None else None,
            runner.versioned(adapter) if adapter is not None else None,
            start=start,
            size=size,
            input_grad=needs["hidden"],
            keep=any(needs.values()),
        )
        runner.forward(parts, end, want_prefix=want_prefix)
        ctx.runner, ctx.parts, ctx.needs, ctx.shape = runner, parts, needs, hidden.shape
        ctx.metas = {name: _TensorMeta.of(tensor) for name, tensor in leaves.items()}
        if rows is not None:
            out = hidden.new_zeros(len(rows), hidden.shape[-1])
            for part in parts:
                out[part.row_positions.to(out.device)] = part.result.hidden.to(out)
        else:
            out = torch.cat([part.result.hidden.to(hidden) for part in parts])
        prefix_out = parts[0].result.prefix.to(hidden) if want_prefix and prefix is not None else hidden.new_empty(0)
        return out, prefix_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad, grad_prefix_out = grads
        parts, kinds = ctx.parts, ctx.metas
        pieces = [
            grad[part.row_positions.to(grad.device)] if part.row_positions is not None else grad[part.first : part.last]
            for part in parts
        ]
        uses_prefix = grad_prefix_out is not None and grad_prefix_out.numel() > 0
        hidden_grads, prefix_grad, adapter_grads = ctx.runner.backward(
            parts, [piece.cpu() for piece in pieces], grad_prefix_out.cpu() if uses_prefix else None
        )
        hidden_grad = None
        if ctx.needs["hidden"]:
            hidden_grad = torch.zeros(ctx.shape, dtype=kinds["hidden"].dtype, device=kinds["hidden"].device)
            for part, piece in zip(parts, hidden_grads, strict=True):
                hidden_grad[part.first : part.last] = piece.to(hidden_grad)
        found = {"prefix": prefix_grad} | (adapter_grads.tensors() if adapter_grads is not None else {})
        shared = [
            grad.to(**vars(kinds[name])) if needed and (grad := found[name]) is not None else None
            for name, needed in ctx.needs.items()
            if name != "hidden"
        ]
        return (*[None] * 7, hidden_grad, *shared)


@dataclass(frozen=True)
class _TensorMeta:
    """Device and dtype of one of the caller's tensors, restored in the result or gradient that corresponds to it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> _TensorMeta | None:
        return cls(tensor.device, tensor.dtype) if tensor is not None else None


async def _gather(coroutines: Any) -> list[Any]:
    """All results in order; the first error cancels the rest and is raised unchanged."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
