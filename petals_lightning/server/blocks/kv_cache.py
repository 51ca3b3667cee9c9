"""Keys and values of a session, appended in place.

Shapes: B batch, T positions held, D head size. Keys and values may differ in D; blocks may differ in heads and D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petals_lightning.hf.compat import Cache, CacheLayer

_FIRST_CAPACITY = 64  # positions


class GrowingLayer(CacheLayer):
    """Holds keys and values [B, heads, T, D] in buffers that double when full, so that a step copies only new ones.

    All T positions are kept, so a session can go back to any of them. The attention mask applies sliding windows.

    Args:
        max_length: upper limit of T.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self._max_length, self._length = max_length, 0
        self._buffers: list[torch.Tensor] = []  # keys and values, [B, heads, capacity, D] each

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._buffers = [
            states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)
        ]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, heads, n, D]; returns all T + n positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self._length + key_states.shape[2]
        if length > self._buffers[0].shape[2]:
            self._grow(length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : length] = new
        return self._show(length)

    def keep_first(self, length: int) -> None:
        if self.is_initialized:
            self._show(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for buffer in self._buffers:
            buffer[:, :, : self._length] = buffer[:, :, : self._length].index_select(0, beam_idx.to(buffer.device))

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self._max_length

    def _grow(self, length: int) -> None:
        assert length <= self._max_length, f"{length} positions where {self._max_length} were reserved"
        capacity = min(max(length, 2 * self._buffers[0].shape[2], _FIRST_CAPACITY), self._max_length)
        for index, old in enumerate(self._buffers):
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self._length] = old[:, :, : self._length]
            self._buffers[index] = new

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets the number of positions held; returns their keys and values."""
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self._length, self.keys, self.values = length, keys, values
        return keys, values


class StackedLayer(CacheLayer):
    """Layers of several sessions as one batch, aligned at the end like samples padded on the left.

    Each session's own layer stores its new positions. Reads return a copy. Shorter sessions are padded with zeros on
    the left, which the attention mask must hide.

    Args:
        layers: one per session.
        batches: number of samples of each.
        scratch: buffers for the copies; layers that run one after another share them.
    """

    def __init__(self, layers: Sequence[GrowingLayer], batches: Sequence[int], scratch: dict[Any, torch.Tensor]):
        super().__init__()
        self._layers, self._batches, self._scratch = layers, list(batches), scratch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B of all, heads, n, D]; returns T + n positions, with T of the longest session."""
        new = zip(key_states.split(self._batches), value_states.split(self._batches), strict=True)
        held = [layer.update(*pair) for layer, pair in zip(self._layers, new, strict=True)]
        return self._stack(0, [keys for keys, _ in held]), self._stack(1, [values for _, values in held])

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)

    def _stack(self, kind: int, parts: list[torch.Tensor]) -> torch.Tensor:
        length = max(part.shape[2] for part in parts)
        shape = (sum(self._batches), parts[0].shape[1], length, parts[0].shape[3])
        key = (kind, parts[0].device, *shape)
        if (stacked := self._scratch.get(key)) is None:
            stacked = self._scratch[key] = parts[0].new_zeros(shape)
        for rows, part in zip(stacked.split(self._batches), parts, strict=True):
            rows[:, :, length - part.shape[2] :] = part
        return stacked


class SpanCache(Cache):
    """One layer per hosted block. A pass uses those from block `first` on, and lengths are theirs."""

    def __init__(self, layers: Sequence[CacheLayer], first: int):
        super().__init__(layers=list(layers))
        self.attention_layers, self.first = layers, first

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.attention_layers[max(layer_idx, self.first)].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.attention_layers[max(layer_idx, self.first)].get_mask_sizes(query_length)
