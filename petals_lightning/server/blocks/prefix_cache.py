"""Keys and values of the prefix: computed once with batch 1, read by every sample of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from petals_lightning.hf.compat import CacheLayer
from petals_lightning.protocol.adapters import PastKeyValues
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


def unbound(
    past: Iterable[PastKeyValues], dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Blocks with their keys [h, P, D] and values [h, P, E]."""
    for each in past:  # unbound, not indexed: the gradient of an index is as large as the whole tensor, for each block
        yield from zip(each.blocks, each.keys.to(dtype).unbind(), each.values.to(dtype).unbind(), strict=True)


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

    def fill(self, past: Sequence[PastKeyValues], dtype: torch.dtype, first_hosted: int) -> PrefixCache:
        """Puts keys and values that were given in place of a prefix's; returns itself.

        Args:
            first_hosted: number of the first hosted block in the full model.
        """
        for block, keys, values in unbound(past, dtype):
            self.attention_layers[block - first_hosted].lazy_initialization(keys[None], values[None])
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
