"""Runs a range of hosted blocks through the code of the model's own class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.compat import cache_name
from petals_lightning.hf.linears import add_low_rank, linears_of
from petals_lightning.hf.pruning import BlockLayout, sliced_config
from petals_lightning.hf.quantization import dtype_and_device
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.server.blocks.kv_cache import SpanCache


@dataclass
class BlockPass:
    """One pass through blocks [start, end).

    Attributes:
        hidden: [B, S, H] enters the first block.
        adapter: of these blocks or more, on the model's device, or None. Deep prompts are for the first P positions.
        output: [B, S, H] of the last block, once it has run.
        copies: on other devices, of tensors that all blocks take, such as masks; by id, with the tensor itself.
    """

    start: int
    end: int
    hidden: torch.Tensor
    adapter: Adapter | None
    output: torch.Tensor | None = None
    copies: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def on_device(self, value: Any, device: torch.device) -> Any:
        """An argument of a block on its device: a tensor, or what holds tensors."""
        if isinstance(value, torch.Tensor):
            key = id(value), device
            if value.device != device and key not in self.copies:
                self.copies[key] = value, value.to(device)
            return value if value.device == device else self.copies[key][1]
        if isinstance(value, (tuple, list)):
            return type(value)(self.on_device(each, device) for each in value)
        if isinstance(value, dict):
            return {name: self.on_device(each, device) for name, each in value.items()}
        return value


class BlockRunner:
    """Runs blocks of a pruned model. Hooks on the blocks set their inputs and collect the output.

    LoRA is in hooks that live for one pass: no other client's pass can meet it. Blocks may be on several devices: each
    gets its arguments on its own.

    Args:
        model: the pruned model.
        layout: where its blocks are.
        start: number of its first block in the full model.
    """

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, start: int):
        self._model, self._layout, self._start = model, layout, start
        self._blocks, self._config = list(layout.blocks(model)), model.config
        self._linears = {number: linears_of(block) for number, block in enumerate(self._blocks, start)}
        self._cache_name = cache_name(model)
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._slices: dict[tuple[int, int], tuple[nn.ModuleList, Any]] = {}
        self._running: BlockPass | None = None
        devices = [dtype_and_device(block)[1] for block in self._blocks]
        for number, (block, device) in enumerate(zip(self._blocks, devices, strict=True), start):
            if len(set(devices)) > 1:  # first, as the other hook finds what has been moved
                block.register_forward_pre_hook(self._to_device(device), with_kwargs=True)
            block.register_forward_pre_hook(self._before_block(number))
            block.register_forward_hook(self._after_block(number))

    def run(
        self,
        blocks: BlockPass,
        cache: SpanCache | None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs a pass and returns its output [B, S, H].

        Args:
            blocks: the pass.
            cache: keys and values before `hidden`, which the pass extends; None: no cache.
            attention_mask: [B, positions in the cache and new], 0 at padding; None: no padding.
            position_ids: [B, S]; None: they follow the cache. Ignored by families that take positions from the mask.
        """
        padding: dict[str, torch.Tensor] = {}
        if attention_mask is not None:
            padding["attention_mask"] = attention_mask.long()
        if position_ids is not None and self._takes_position_ids:
            padding["position_ids"] = position_ids
        with self._sliced(blocks.start, blocks.end), self._with_lora(blocks):
            self._running = blocks
            try:
                cached = {self._cache_name: cache, "use_cache": cache is not None}
                self._model(inputs_embeds=blocks.hidden, **cached, **padding)
            finally:
                self._running = None
        if blocks.output is None:
            raise UnsupportedModelError(f"{type(self._model).__name__} left out its last block")
        return blocks.output

    def linears(self, block: int) -> dict[str, nn.Module]:
        """The linear modules of a hosted block, by path."""
        return self._linears[block]

    @contextmanager
    def _with_lora(self, blocks: BlockPass) -> Iterator[None]:
        """Adds the adapter's LoRA, and an active one's, to the linears of a pass, until that ends, however it ends."""
        with ExitStack() as hooks:
            for factors in blocks.adapter.all_lora if blocks.adapter is not None else ():
                own = factors.between(blocks.start, blocks.end)
                # Unbound, not indexed: the gradient of an index is as large as the whole tensor, for each block.
                a, b = (tensor.to(blocks.hidden.dtype).unbind() for tensor in (own.a, own.b))
                for number, *pair in zip(own.blocks, a, b, strict=True):
                    linear = self._linears[number][own.target]
                    hooks.callback(linear.register_forward_hook(_low_rank(*pair), with_kwargs=True).remove)
            yield

    @contextmanager
    def _sliced(self, start: int, end: int) -> Iterator[None]:
        """Makes the model look as if it had only blocks [start, end)."""
        first, last = start - self._start, end - self._start
        if (first, last) == (0, len(self._blocks)):
            yield
            return
        if (first, last) not in self._slices:
            self._slices[first, last] = (
                nn.ModuleList(self._blocks[first:last]),
                sliced_config(self._config, first, last),
            )
        blocks, config = self._slices[first, last]
        owner, all_blocks = self._layout.owner(self._model), self._layout.blocks(self._model)
        self._layout.set_blocks(self._model, blocks)
        owner.config = config
        try:
            yield
        finally:
            self._layout.set_blocks(self._model, all_blocks)
            owner.config = self._config

    def _to_device(self, device: torch.device) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            running = self._running
            assert running is not None
            return running.on_device(args, device), running.on_device(kwargs, device)

        return hook

    def _before_block(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            running = self._running
            assert running is not None
            # The first block takes the hidden states as they arrived, not as the owner scaled or normalised them.
            hidden = running.hidden.to(args[0].device) if number == running.start else args[0]
            if (adapter := running.adapter) is not None and adapter.deep is not None:
                deep = adapter.deep[number - adapter.start].to(hidden)
                hidden = hidden + nn.functional.pad(deep, (0, 0, 0, hidden.shape[1] - deep.shape[-2]))
            return (hidden, *args[1:])

        return hook

    def _after_block(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running = self._running
            assert running is not None
            if number == running.end - 1:
                running.output = (output[0] if isinstance(output, tuple) else output).to(running.hidden.device)

        return hook


def _low_rank(a: torch.Tensor, b: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        return add_low_rank(args[0] if args else kwargs["input"], output, a, b)

    return hook
