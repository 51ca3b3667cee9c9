"""Gathers the positions of a batch that are read, and scatters them back.

Modules that treat each position separately (final norm, head) then run only on positions that are read. After the
blocks all others are zeros.

Shapes: B batch, S tokens, N positions that are read, D features.
"""

from __future__ import annotations

import torch


def gather_positions(batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, S, D] → [1, N, D], for positions [N], indices into B·S."""
    return batch.flatten(0, 1)[positions.to(batch.device)][None]


def scatter_positions(values: torch.Tensor, positions: torch.Tensor, batch_size: int, tokens: int) -> torch.Tensor:
    """[1, N, D] or [N, D] → [B, S, D]: zeros except at `positions`."""
    features = values.shape[-1]
    batch = values.new_zeros(batch_size * tokens, features)
    batch.index_copy_(0, positions.long().to(values.device), values.reshape(-1, features))
    return batch.view(batch_size, tokens, features)
