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


def verify_shared_prefix(span: BlockSpan) -> bool:
    """Whether running the prefix once gives what the concatenated batch gives.

    False for families whose attention is not ordinary (a state that samples change, say); they fall back to the
    concatenated form, on the server alone.
    """
    return _changes_nothing(span, "share_prefix")


def verify_skipping(span: BlockSpan) -> bool:
    """Whether positions that are read have the outputs of a full pass where the last block skips the others.

    False for families whose last block keeps no keys and values; there it runs on all positions.
    """
    return _changes_nothing(span, "skips_unread", rows=[2, 5, 14])


@torch.no_grad()
def _changes_nothing(span: BlockSpan, option: str, rows: list[int] | None = None) -> bool:
    """Whether a span's outputs are the same with an option and without; `rows` are of three samples of five tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, span.hidden_size, generator=generator)
    prefix = torch.randn(3, span.hidden_size, generator=generator)
    read = torch.tensor(rows) if rows is not None else None
    inputs, chosen = SpanInputs(span.start, span.end, hidden, prefix, rows=read), getattr(span, option)

    def outputs(value: bool) -> torch.Tensor:
        setattr(span, option, value)
        return span.forward(inputs)[0]

    try:
        return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
    finally:
        setattr(span, option, chosen)
