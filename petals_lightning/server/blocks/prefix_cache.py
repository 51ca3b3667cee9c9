"""Keys and values of the prefix: computed once with batch 1, read by every sample of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from petals_lightning.hf.compat import CacheLayer
from petals_lightning.protocol.adapters import PastKeyValues, by_block
from petals_lightning.server.blocks.kv_cache import SpanCache


class PrefixLayer(CacheLayer):
    """Keeps the first keys and values that it is given, [1, heads, P, D], and returns later ones appended to them.

    Nothing is updated in place or detached: gradients flow back into the prefix. The attention mask sees all P + S
    positions and applies sliding windows.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        batch = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2),
        )

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.keys is not None else 0


def shapes_of(past: Sequence[PastKeyValues]) -> list[tuple[int, int, int]]:
    """Heads, size of a key and size of a value of each block, in order."""
    return [(keys.shape[0], keys.shape[2], values.shape[2]) for keys, values in by_block(past)]


class KeysTaken(Exception):
    """Ends a pass through a block when the cache holds its keys and values; nothing else is needed."""


class TakingLayer(PrefixLayer):
    """Takes the keys and values of S tokens, and ends that pass. Later passes read those of all P + S positions.

    Args:
        prefix: of the same block; it has run.
    """

    def __init__(self, prefix: PrefixLayer):
        super().__init__()
        self._prefix = prefix

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(*self._prefix.update(key_states, value_states))
            raise KeysTaken
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of positions before the one that a pass computes: once keys are held, all but the last."""
        return super().get_seq_length() - 1 if self.is_initialized else self._prefix.get_seq_length()


class PrefixCache(SpanCache):
    """One PrefixLayer per hosted block; a pass runs blocks from `first` on."""

    attention_layers: list[PrefixLayer]

    def __init__(self, num_blocks: int, first: int):
        super().__init__([PrefixLayer() for _ in range(num_blocks)], first)

    def fill(self, past: Sequence[PastKeyValues], dtype: torch.dtype, devices: Sequence[torch.device]) -> PrefixCache:
        """Puts keys and values that were given in place of a prefix's, from block `first` on; returns itself.

        Args:
            past: given by the client.
            dtype: of the passes.
            devices: of all hosted blocks.
        """
        own = slice(self.first, None)
        for layer, device, pair in zip(self.attention_layers[own], devices[own], by_block(past), strict=False):
            layer.lazy_initialization(*(tensor[None].to(device, dtype) for tensor in pair))
        return self

    def past(self, first_hosted: int) -> tuple[PastKeyValues, ...]:
        """Keys and values of the blocks that have run."""
        held = enumerate(self.attention_layers, first_hosted)
        return PastKeyValues.grouped(
            {
                block: (layer.keys[0], layer.values[0])
                for block, layer in held
                if layer.keys is not None and layer.values is not None
            }
        )

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of the blocks that have run."""
        held = (tensor for layer in self.attention_layers for tensor in (layer.keys, layer.values))
        return [tensor for tensor in held if tensor is not None]

    def detached(self) -> PrefixCache:
        """A copy whose keys and values are the leaves of a new graph."""
        cut = PrefixCache(len(self.attention_layers), self.first)
        for layer, own in zip(self.attention_layers, cut.attention_layers, strict=True):
            if layer.keys is not None and layer.values is not None:
                own.lazy_initialization(*(tensor.detach().requires_grad_() for tensor in (layer.keys, layer.values)))
        return cut

    def taking(self, index: int) -> SpanCache:
        """A cache in which one block (counted from the first hosted one) takes the keys and values of the tokens."""
        layers, prefix = list(self.attention_layers), self.attention_layers[index]
        assert isinstance(prefix, PrefixLayer)
        layers[index] = TakingLayer(prefix)
        return SpanCache(layers, index)
