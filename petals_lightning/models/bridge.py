"""Joins a pruned decoder with its remote blocks: what enters them, and how the prefix gets there.

The family's own code embeds tokens, adds positions, normalises and classifies; only the prefix is special. It never
appears in this process's batches: its embeddings take the decoder's own way to the first block once, with batch 1, and
samples are told (through a cache that claims to hold the prefix) that P positions stand before them.

Shapes: B batch, S tokens, P virtual tokens, E embedding width, H hidden size, N rows that are read.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from petals_lightning.client.inference import InferenceSession
from petals_lightning.client.remote_sequential import Context, RemoteSequential
from petals_lightning.client.rows import put_rows, take_rows
from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf.skeleton import BlockLayout, norms_of
from petals_lightning.models.prompts import Prompts
from petals_lightning.models.remote_cache import OffsetLayer, RemoteCache

if TYPE_CHECKING:
    from petals_lightning.models.generation import GenerationSession


class _Pass(threading.local):
    """What the hooks know of the running pass: several threads may run the model at once."""

    rows: torch.Tensor | None = None
    output: weakref.ref[torch.Tensor] | None = None  # of the blocks, [B, S, H], where rows are read
    cache: RemoteCache | None = None
    keep: int = 0


class DecoderBridge:
    """Hooks on the owner of the blocks.

    Args:
        model: the pruned model; its prompts, if any, are attached to the owner.
        layout: where the blocks were.
        layers: the remote blocks to put there.

    Attributes:
        rows: [N] indices into B·S that the next pass of this thread reads, None for all.
        session: the conversation that `generate` goes on with, if there is one.
    """

    def __init__(self, model: PreTrainedModel, layout: BlockLayout, layers: RemoteSequential):
        layout.set_blocks(model, layers)
        owner = layout.owner(model)
        self._layers, self._owner, self._embed = layers, owner, model.get_input_embeddings()
        self._prompts: Prompts | None = getattr(owner, "prompts", None)
        self._pass = _Pass()
        self.session: GenerationSession | None = None
        self._own_session: InferenceSession | None = None
        self._takes_position_ids = "position_ids" in inspect.signature(owner.forward).parameters
        if model is not owner:
            model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        owner.register_forward_pre_hook(self._before, with_kwargs=True)
        owner.register_forward_hook(self._after)
        layers.register_forward_hook(self._after_layers)
        for norm in norms_of(owner, model.config.get_text_config().hidden_size):
            norm.forward = functools.partial(self._normalise, norm.forward)

    @property
    def rows(self) -> torch.Tensor | None:
        return self._pass.rows

    @rows.setter
    def rows(self, rows: torch.Tensor | None) -> None:
        self._pass.rows = rows

    def open_session(self, max_length: int) -> InferenceSession:
        """A session of the blocks behind the model's prompts, as they are now."""
        with torch.no_grad():
            prefix, deep = self._prompts_at_first_block()
        return self._layers.inference_session(max_length=max_length, prefix=prefix, deep=deep)

    def own_session(self, max_length: int) -> InferenceSession:
        """The session of a single `generate`, to be closed at its end."""
        self.close_own_session()
        self._own_session = self.open_session(max_length)
        return self._own_session

    def close_own_session(self) -> None:
        session, self._own_session = self._own_session, None
        if session is not None:
            session.close()

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A model that computes the logits of the last positions only reads no other position.
        keep = kwargs.get("logits_to_keep")
        self._pass.keep = keep if isinstance(keep, int) else 0

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._layers.context.capture:
            return None
        if args:
            kwargs["input_ids"], *rest = args
            if rest:
                raise UnsupportedInputError("give everything behind input_ids by name")
        cache = kwargs.get("past_key_values")
        self._pass.cache = cache if isinstance(cache, RemoteCache) else None
        self._check(kwargs)
        embeds = kwargs.pop("inputs_embeds", None)
        input_ids = kwargs.pop("input_ids", None)
        if embeds is None:
            embeds = self._embed(input_ids)
        kwargs["inputs_embeds"] = embeds
        if self._pass.cache is not None:
            return (), kwargs | self._begin_step(self._pass.cache.session, **_padding(kwargs))
        prefix, deep = self._prompts_at_first_block()
        self._layers.context = Context(prefix=prefix, deep=deep, rows=self.rows)
        return (), kwargs | {
            "attention_mask": None,  # right padding needs none: no real token sees what stands behind it
            "use_cache": False,
            "past_key_values": Cache(layers=[OffsetLayer(self._prompts.pre_seq_len)]) if self._prompts else None,
        }

    def _begin_step(
        self, session: InferenceSession, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> dict[str, Any]:
        """Tells the blocks of a step in a session; returns what its decoder is told, which counts the prefix in."""
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        counted = position_ids
        if attention_mask is not None and not self._takes_position_ids:  # such a family counts by the mask
            counted = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, session.position :]
        self._layers.context = Context(
            session=session, attention_mask=attention_mask, position_ids=counted, keep=self._pass.keep
        )
        length = self._prompts.pre_seq_len if self._prompts is not None else 0
        told: dict[str, Any] = {
            "attention_mask": nn.functional.pad(attention_mask, (length, 0), value=1)
            if attention_mask is not None
            else None,
            "past_key_values": Cache(layers=[OffsetLayer(length + session.position)]),
            "use_cache": True,
        }
        return told | {"position_ids": position_ids + length} if position_ids is not None else told

    def _after(self, owner: nn.Module, args: Any, output: Any) -> Any:
        if not self._layers.context.capture:
            self._layers.context = Context()
            if "past_key_values" in output:
                output.past_key_values = self._pass.cache
            self._pass.cache = None
        return output

    def _after_layers(self, layers: nn.Module, args: Any, output: Any) -> None:
        if self.rows is not None and not self._layers.context.capture:
            self._pass.output = weakref.ref(output[0] if isinstance(output, tuple) else output)

    def _normalise(self, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A norm of the owner; the one behind the blocks normalises the rows that are read only.

        All others are zeros there, and to normalise them cost more than the rest of this process's step.
        """
        rows, output = self.rows, self._pass.output
        if rows is None or output is None or hidden is not output():
            return forward(hidden, *args, **kwargs)
        return put_rows(forward(take_rows(hidden, rows), *args, **kwargs), rows, *hidden.shape[:2])

    def _prompts_at_first_block(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The prefix's hidden states [P, H] before the first block and deep prompts [L, P, H], or None."""
        if self._prompts is None:
            return None, None
        dtype = next(self._embed.parameters()).dtype
        self._layers.context = capture = Context(capture=True)
        try:
            self._owner(inputs_embeds=self._prompts.input.to(dtype)[None], use_cache=False)
        finally:
            self._layers.context = Context()
        assert capture.captured is not None
        return capture.captured[0], self._prompts.deep

    def _check(self, kwargs: dict[str, Any]) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise UnsupportedInputError(
                    f"{name}=True: blocks run on servers, which return the last block's output only. "
                    "Leave it off, or run model.layers[a:b] piece by piece"
                )
        if self._pass.cache is not None:
            if self.rows is not None or torch.is_grad_enabled():
                raise UnsupportedInputError("an inference session gives no gradients: call it under torch.no_grad()")
            if (mask := kwargs.get("attention_mask")) is not None and mask.ndim != 2:
                raise UnsupportedInputError(f"attention_mask must be [B, T] of 0 and 1, got {tuple(mask.shape)}")
            return
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise UnsupportedInputError(
                "use_cache / past_key_values: keys and values live on servers; call generate, or open an "
                "inference_session and give its `cache` as past_key_values"
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


def _padding(kwargs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    return {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
