"""Keys and values of the prefix, computed once with batch 1 and read by every sample of the batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


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


class PrefixCache(Cache):
    """One PrefixLayer per hosted block."""

    def __init__(self, num_blocks: int):
        super().__init__(layers=[PrefixLayer() for _ in range(num_blocks)])
        self._used = 0

    def use_from(self, first: int) -> None:
        """Lets lengths be read from the first block that is run: a sub-span leaves earlier layers empty."""
        self._used = first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._prefix_layer(layer_idx).get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._prefix_layer(layer_idx).get_mask_sizes(query_length)

    def _prefix_layer(self, layer_idx: int) -> PrefixLayer:
        layer = self.layers[max(layer_idx, self._used)]
        assert isinstance(layer, PrefixLayer)
        return layer
