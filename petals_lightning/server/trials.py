"""What the blocks of a family allow, tried on random hidden states when a server starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from petals_lightning.server.span import BlockSpan, SpanInputs


def same_outputs(span: BlockSpan, *ways: Callable[[], torch.Tensor]) -> bool:
    """Whether two ways to run a span give the same up to rounding; False where the family's code refuses one."""
    try:
        outputs = [run().float() for run in ways]
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError, ValueError):
        return False
    tolerance = 1e-4 if span.dtype == torch.float32 else 5e-2
    error = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    return bool(error < tolerance)


@torch.no_grad()
def verify_shared_prefix(span: BlockSpan) -> bool:
    """Whether running the prefix once gives what the concatenated batch gives, tried on random hidden states.

    False for families whose attention is not ordinary (a state that samples change, say); they fall back to the
    concatenated form, on the server alone.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, span.hidden_size, generator=generator).to(span.device)
    prefix = torch.randn(3, span.hidden_size, generator=generator).to(span.device)
    inputs = SpanInputs(span.start, span.end, hidden, prefix)
    chosen = span.share_prefix

    def outputs(share: bool) -> torch.Tensor:
        span.share_prefix = share
        return span.forward(inputs)[0]

    try:
        return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
    finally:
        span.share_prefix = chosen


@torch.no_grad()
def verify_single_reads(span: BlockSpan) -> bool:
    """Whether positions that are read singly have the outputs of a full pass.

    False for families whose last block keeps no keys and values; there it runs on all positions.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, span.hidden_size, generator=generator).to(span.device)
    prefix = torch.randn(3, span.hidden_size, generator=generator).to(span.device)
    rows = torch.tensor([2, 5, 14], device=span.device)
    inputs, chosen = SpanInputs(span.start, span.end, hidden, prefix, rows=rows), span.reads_singly

    def outputs(singly: bool) -> torch.Tensor:
        span.reads_singly = singly
        return span.forward(inputs)[0]

    try:
        return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
    finally:
        span.reads_singly = chosen
