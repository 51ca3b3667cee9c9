"""Positions of a batch that are read, taken out of it and put back.

Modules that treat every position by itself (final norm, head) then run on what is read only. Behind the blocks all
others are zeros.

Shapes: B batch, S tokens, N positions that are read, D features.
"""

from __future__ import annotations

import torch


def gather_positions(batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, S, D] → [1, N, D], with rows [N] indices into B·S."""
    return batch.flatten(0, 1)[rows.to(batch.device)][None]


def scatter_positions(values: torch.Tensor, rows: torch.Tensor, batch_size: int, tokens: int) -> torch.Tensor:
    """[1, N, D] or [N, D] → [B, S, D]: zeros but for `rows`."""
    features = values.shape[-1]
    batch = values.new_zeros(batch_size * tokens, features)
    batch.index_copy_(0, rows.long().to(values.device), values.reshape(-1, features))
    return batch.view(batch_size, tokens, features)
