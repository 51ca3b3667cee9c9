"""What a family's blocks keep of each position, found by running them until they hand it to their cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.checkpoint import refusing
from petals_lightning.hf.compat import Cache, CacheLayer, cache_name
from petals_lightning.hf.pruning import BlockLayout

PastShape = tuple[int, int, int]
"""Heads, size of a key, size of a value."""

_TOKENS = 2


class _KeysArrived(Exception):
    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values


class _EmptyLayer(CacheLayer):
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("nothing is kept")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is kept")

    def get_seq_length(self) -> int:
        return 0


class _ProbingCache(Cache):
    """Ends a block's pass when its keys and values arrive."""

    def __init__(self) -> None:
        super().__init__(layers=[_EmptyLayer()])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _KeysArrived(key_states, value_states)


class _Probe(nn.Module):
    """In the place of a block: runs it up to its keys and values, and returns its input.

    Args:
        block: on any device, also `meta`.
        returns_tuple: return the input in a tuple.
    """

    def __init__(self, block: nn.Module, *, returns_tuple: bool):
        super().__init__()
        self.__dict__["block"] = block  # not as a part of this module
        self.returns_tuple = returns_tuple
        self.shape: PastShape | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # some decoders read their blocks' attributes

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.block.parameters())
        moved = _moved((hidden, *args), weight), _moved(kwargs, weight)
        try:
            self.block(*moved[0], **moved[1])
        except _KeysArrived as arrived:
            keys, values = arrived.keys, arrived.values
            if keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] and keys.shape[2] == _TOKENS:
                self.shape = keys.shape[1], keys.shape[3], values.shape[3]
        return (hidden,) if self.returns_tuple else hidden


def _moved(value: Any, weight: torch.Tensor) -> Any:
    """Tensors inside of `value` on the device of `weight`, and floating ones in its dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(weight) if value.is_floating_point() else value.to(weight.device)
    if isinstance(value, dict):
        return {name: _moved(each, weight) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(each, weight) for each in value)
    return value


@torch.no_grad()
def past_shapes(model: PreTrainedModel, layout: BlockLayout, blocks: Iterable[nn.Module]) -> dict[int, PastShape]:
    """What each block keeps of a position, by block.

    Args:
        model: without hooks, with its embeddings; what it has in the place of blocks is there again afterwards.
        layout: of the whole model.
        blocks: all blocks of the model, on any device, also `meta`: only attention runs, up to its keys and values.

    Raises:
        UnsupportedModelError: a block keeps something else, such as the state of a recurrent layer.
    """
    owner, own = layout.owner(model), layout.blocks(model)
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    embeds = embedding.new_zeros(1, _TOKENS, embedding.shape[1])
    name = f"{type(model).__name__} ({model.config.model_type})"
    blocks = list(blocks)

    def run(returns_tuple: bool) -> list[PastShape | None]:
        probes = [_Probe(block, returns_tuple=returns_tuple) for block in blocks]
        layout.set_blocks(model, nn.ModuleList(probes))
        try:
            owner(inputs_embeds=embeds, use_cache=True, **{cache_name(owner): _ProbingCache()})
        finally:
            layout.set_blocks(model, own)
        return [probe.shape for probe in probes]

    with refusing(f"{name} has no trained prefix: its attention does not run by itself; use tuning_mode='deep_ptune'"):
        try:
            shapes = run(returns_tuple=False)
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            shapes = run(returns_tuple=True)  # such a decoder takes the first part of what a block returns
        if None in shapes:
            shapes = run(returns_tuple=True)
    if None in shapes:
        raise UnsupportedModelError(
            f"{name} has no trained prefix: block {shapes.index(None)} keeps no keys and values; use "
            "tuning_mode='deep_ptune'"
        )
    return {number: shape for number, shape in enumerate(shapes) if shape is not None}
