"""Keys and values of the prefix, computed once with batch 1 and read by every sample of the batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from petals_lightning.server.kv_cache import SpanCache


class PrefixLayer(CacheLayerMixin):
    """Keeps the first keys and values that it is given, [1, heads, P, D]; later ones are returned behind them.

    Nothing is updated in place and nothing detached: gradients flow back into the prefix. Sliding windows are left to
    the attention mask, which sees all P + S positions.
    """

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        batch = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2),
        )

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.keys is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def prefix_cache(num_blocks: int, first: int) -> SpanCache:
    """One PrefixLayer per hosted block; blocks from `first` on are run."""
    return SpanCache([PrefixLayer() for _ in range(num_blocks)], first)
