"""Joins a pruned decoder with its remote blocks: what enters them, and how the prefix gets there.

The family's own code embeds tokens, adds positions, normalises and classifies; only the prefix is special. It never
appears in this process's batches: its embeddings take the decoder's own way to the first block once, with batch 1, and
samples are told (through a cache that claims to hold the prefix) that P positions stand before them.

Shapes: B batch, S tokens, P virtual tokens, E embedding width, H hidden size, N rows that are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from petals_lightning.client.remote_sequential import Context, RemoteSequential
from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf.skeleton import BlockLayout
from petals_lightning.models.prompts import Prompts


class _OffsetLayer(CacheLayerMixin):
    """Claims to hold `length` positions; holds nothing, since no block of this process ever asks for it."""

    is_sliding = False

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("no attention runs in this process")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no attention runs in this process")

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class DecoderBridge:
    """Hooks on the owner of the blocks.

    Args:
        model: the pruned model; its prompts, if any, are attached to the owner.
        layout: where the blocks were.
        layers: the remote blocks to put there.
    """

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, layers: RemoteSequential):
        layout.set_blocks(model, layers)
        owner = layout.owner(model)
        self._layers, self._embed = layers, model.get_input_embeddings()
        self._prompts: Prompts | None = getattr(owner, "prompts", None)
        self.rows: torch.Tensor | None = None
        owner.register_forward_pre_hook(self._before, with_kwargs=True)
        owner.register_forward_hook(self._after)

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._layers.context.capture:
            return None
        if args:
            kwargs["input_ids"], *rest = args
            if rest:
                raise UnsupportedInputError("give everything behind input_ids by name")
        self._check(kwargs)
        embeds = kwargs.pop("inputs_embeds", None)
        input_ids = kwargs.pop("input_ids", None)
        if embeds is None:
            embeds = self._embed(input_ids)
        self._layers.context = self._context(owner, embeds)
        return (), kwargs | {
            "inputs_embeds": embeds,
            "attention_mask": None,  # right padding needs none: no real token sees what stands behind it
            "use_cache": False,
            "past_key_values": Cache(layers=[_OffsetLayer(self._prompts.pre_seq_len)]) if self._prompts else None,
        }

    def _after(self, owner: nn.Module, args: Any, output: Any) -> Any:
        if not self._layers.context.capture:
            self._layers.context = Context()
            if "past_key_values" in output:
                output.past_key_values = None
        return output

    def _context(self, owner: nn.Module, embeds: torch.Tensor) -> Context:
        context = Context(rows=self.rows)
        if self._prompts is not None:
            self._layers.context = capture = Context(capture=True)
            try:
                owner(inputs_embeds=self._prompts.input.to(embeds.dtype)[None], use_cache=False)
            finally:
                self._layers.context = Context()
            assert capture.captured is not None
            context.prefix, context.deep = capture.captured[0], self._prompts.deep
        return context

    @staticmethod
    def _check(kwargs: dict[str, Any]) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise UnsupportedInputError(
                    f"{name}=True: blocks run on servers, which return the last block's output only. "
                    "Leave it off, or run model.layers[a:b] piece by piece"
                )
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise UnsupportedInputError(
                "use_cache / past_key_values: keys and values live on servers, this call cannot take or return them"
            )
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            raise UnsupportedInputError("position_ids: servers number positions from the start; leave it off")
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.ndim != 2:
                raise UnsupportedInputError(f"attention_mask must be [B, S] of 0 and 1, got {tuple(mask.shape)}")
            if (mask[:, 1:] > mask[:, :-1]).any():
                raise UnsupportedInputError(
                    "attention_mask has padding on the left or inside: training through a swarm takes right padding "
                    "only; set tokenizer.padding_side = 'right'"
                )
