"""Keys and values of a session, appended in place.

Shapes: B batch, T positions held, D head size; keys and values may differ in D, and blocks in heads and D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_FIRST_CAPACITY = 64  # positions


class GrowingLayer(CacheLayerMixin):
    """Holds keys and values [B, heads, T, D] in buffers that double when full, so that a step copies nothing old.

    Sliding windows are left to the attention mask, which sees all T positions: so any position can be rolled back to.

    Args:
        max_length: T never grows beyond this.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int):
        super().__init__()
        self._max_length, self._length = max_length, 0
        self._buffers: list[torch.Tensor] = []  # of keys and of values, [B, heads, capacity, D]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._buffers = [
            states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, heads, n, D]; returns all T + n."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self._length + key_states.shape[2]
        if length > self._buffers[0].shape[2]:
            self._grow(length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : length] = new
        self._show(length)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last positions; their number is given as 0 or below, as in transformers."""
        if self.is_initialized:
            self._show(max(self._length - abs(tokens_to_remove), 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for buffer in self._buffers:
            buffer[:, :, : self._length] = buffer[:, :, : self._length].index_select(0, beam_idx.to(buffer.device))

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return self._max_length

    def _grow(self, length: int) -> None:
        assert length <= self._max_length, f"{length} positions where {self._max_length} were reserved"
        capacity = min(max(length, 2 * self._buffers[0].shape[2], _FIRST_CAPACITY), self._max_length)
        for index, old in enumerate(self._buffers):
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers[index] = new

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class SpanCache(Cache):
    """A layer per hosted block, of which a sub-span uses those from `first` on: lengths are read from them."""

    def __init__(self, layers: Sequence[CacheLayerMixin], first: int):
        super().__init__(layers=list(layers))
        self._attention_layers, self._first = layers, first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._attention_layers[max(layer_idx, self._first)].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._attention_layers[max(layer_idx, self._first)].get_mask_sizes(query_length)
