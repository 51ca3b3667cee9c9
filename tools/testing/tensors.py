"""Comparison of tensors."""

from __future__ import annotations

import torch


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, in norms of `expected`."""
    return ((got - expected).norm() / expected.norm()).item()
