"""Joins a pruned decoder with its remote blocks: the blocks' inputs, and the way of the prefix.

The family's own code embeds tokens, adds positions, normalises and classifies. Only the prefix is special: it never
appears in this process's batches. Its embeddings take the decoder's own path to the first block once, with batch 1, and
a placeholder cache tells each sample that P positions precede it.

Shapes: B batch, S tokens, P virtual tokens, E embedding width, H hidden size, N positions that are read.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_lightning.client.block_pass import BlockPass
from petals_lightning.client.inference_session import InferenceSession
from petals_lightning.client.positions import gather_positions, scatter_positions
from petals_lightning.client.remote_sequential import RemoteSequential
from petals_lightning.errors import UnsupportedInputError, UnsupportedModelError
from petals_lightning.hf.compat import cache_name, pop_cache, positions_of_logits, set_cache, versions
from petals_lightning.hf.pruning import BlockLayout, norms_of
from petals_lightning.models.lora import Lora
from petals_lightning.models.prompts import Prompts
from petals_lightning.models.remote_cache import RemoteCache
from petals_lightning.protocol.adapters import Adapter, PastKeyValues, by_block


class _Pass(threading.local):
    """State of the running pass; one per thread, because several threads may run the model at once."""

    rows: torch.Tensor | None = None
    output: weakref.ref[torch.Tensor] | None = None  # of the blocks, [B, S, H], if only some positions are read
    keep: int = 0
    session: InferenceSession | None = None  # of a `generate` without a conversation
    open_trial: Callable[[int], InferenceSession] | None = None  # opens a session that skips the blocks


class DecoderBridge:
    """Hooks on the owner of the blocks, which send its passes through the remote blocks.

    Args:
        model: the pruned model; its prompts and LoRA, if any, are attached to the owner.
        layout: where the blocks were.
        layers: the remote blocks that replace them.
        active: an adapter of all blocks that acts in them without being trained, or None.

    Attributes:
        rows: [N] indices into B·S that the next pass of this thread reads, or None for all.
        layers: the remote blocks.
        cache_name: the keyword of the model's cache argument.
        max_positions: virtual tokens and tokens for which the model has positions; None: any number.
    """

    def __init__(
        self, model: PreTrainedModel, layout: BlockLayout, layers: RemoteSequential, active: Adapter | None = None
    ):
        layout.set_blocks(model, layers)
        for name, value in layout.attributes.items():
            if not hasattr(layers, name):
                setattr(layers, name, value)
        owner = layout.owner(model)
        self.layers, self._owner = layers, owner
        self._own_prompts: Prompts | None = getattr(owner, "prompts", None)
        self._own_lora: Lora | None = getattr(owner, "lora", None)
        self._active = active
        self._embeddings = model.get_input_embeddings  # a method, because embeddings may be resized
        self._pass = _Pass()
        self.max_positions = layout.max_positions
        self.cache_name = cache_name(model)
        self._owner_cache_name = cache_name(owner)
        self._takes_position_ids = "position_ids" in inspect.signature(owner.forward).parameters
        if model is not owner:
            model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        owner.register_forward_pre_hook(self._before, with_kwargs=True)
        owner.register_forward_hook(self._after, with_kwargs=True)
        layers.register_forward_hook(self._after_layers, with_kwargs=True)
        layers.returns_tuple = self._expects_tuple()
        for norm in norms_of(owner, model.config.get_text_config().hidden_size):
            norm.forward = functools.partial(self._normalise, norm.forward)

    @property
    def _prompts(self) -> Prompts | None:
        """Those that act in the next pass."""
        return self._own_prompts if self._own_prompts is not None and not self._own_prompts.is_off else None

    @property
    def _lora(self) -> Lora | None:
        """That which acts in the next pass."""
        return self._own_lora if self._own_lora is not None and not self._own_lora.is_off else None

    @property
    def rows(self) -> torch.Tensor | None:
        return self._pass.rows

    @rows.setter
    def rows(self, rows: torch.Tensor | None) -> None:
        self._pass.rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderBridge:
        """The hooks of a copied model, which has passes of its own."""
        copied = memo[id(self)] = object.__new__(DecoderBridge)
        memo[id(self._pass)] = _Pass()
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def open_session(self, max_length: int) -> InferenceSession:
        """A session of the blocks, with the current values of the model's prompts."""
        if self._pass.open_trial is not None:
            return self._pass.open_trial(max_length)
        with torch.no_grad():
            prefix, adapter = self._prefix_at_first_block(), self._adapter()
        return self.layers.inference_session(max_length=max_length, prefix=prefix, adapter=adapter)

    def own_session(self, max_length: int) -> InferenceSession:
        """The session of a single `generate`, to be closed at its end."""
        self.close_own_session()
        self._pass.session = self.open_session(max_length)
        return self._pass.session

    def close_own_session(self) -> None:
        session, self._pass.session = self._pass.session, None
        if session is not None:
            session.close()

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # If the model computes logits of the last positions only, no other position is read.
        self._pass.keep = positions_of_logits(kwargs)
        if "use_cache" in inspect.signature(model.forward).parameters:
            kwargs.setdefault("use_cache", False)  # some families (XGLM) take their config's value otherwise
        return args, kwargs

    @contextmanager
    def without_blocks(self, open_session: Callable[[int], InferenceSession]) -> Iterator[None]:
        """Makes this thread's passes skip the blocks, and its sessions come from `open_session`: to test the ends."""
        self._pass.open_trial = open_session
        try:
            yield
        finally:
            self._pass.open_trial = None

    def first_block_input(self, embeds: torch.Tensor, preceding: int = 0, **padding: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, H] that reach the first block for embeddings [B, S, E].

        Args:
            preceding: positions before these.
            padding: `attention_mask` and `position_ids`, as decoders take them.
        """
        call = BlockPass(preceding, identity=True)
        self._run_owner(embeds, call, **padding)
        assert call.entered is not None
        return call.entered

    def _run_owner(self, embeds: torch.Tensor, call: BlockPass, **padding: torch.Tensor) -> Any:
        return self._owner(inputs_embeds=embeds, use_cache=True, **{self._owner_cache_name: call}, **padding)

    @torch.no_grad()
    def _expects_tuple(self) -> bool:
        """Whether the decoder expects tuples from its blocks. It then takes element 0, so a tensor loses its batch."""
        weight = next(self._embeddings().parameters())
        embeds = weight.new_zeros(2, 3, weight.shape[1])
        try:
            output = self._run_owner(embeds, BlockPass(identity=True)).last_hidden_state
        except UnsupportedModelError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
            return True
        return output.shape[:2] != embeds.shape[:2]

    def _before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if BlockPass.among(kwargs.values()) is not None:  # called by `first_block_input`
            return None
        if args:
            kwargs["input_ids"], *rest = args
            if rest:
                raise UnsupportedInputError("pass every argument after input_ids by name")
        cache = pop_cache(kwargs)
        self._check(kwargs, cache)
        embeds = kwargs.pop("inputs_embeds", None)
        input_ids = kwargs.pop("input_ids", None)
        if embeds is None:
            self._check_tokens(input_ids)
            embeds = self._embeddings()(input_ids)
        kwargs |= {"inputs_embeds": embeds, "use_cache": True}
        if isinstance(cache, RemoteCache):
            step, counted = self._session_step(cache, embeds.shape[1], **_padding(kwargs))
            return (), kwargs | counted | {self._owner_cache_name: step}
        self._check_length(embeds.shape[1])
        is_trial, length = self._pass.open_trial is not None, self._prompts.pre_seq_len if self._prompts else 0
        prefix, adapter = (None, None) if is_trial else (self._prefix_at_first_block(), self._adapter())
        call = BlockPass(length, prefix=prefix, adapter=adapter, rows=self.rows, identity=is_trial)
        # Right padding needs no mask: no real token attends to later positions.
        return (), kwargs | {"attention_mask": None, self._owner_cache_name: call}

    def _session_step(
        self,
        cache: RemoteCache,
        tokens: int,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> tuple[BlockPass, dict[str, Any]]:
        """The pass for a session step, and the mask and positions for its decoder, which include the prefix."""
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        counted, position = position_ids, cache.session.position
        if attention_mask is not None and not self._takes_position_ids:  # such a family derives positions from the mask
            counted = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, position:]
        length = self._prompts.pre_seq_len if self._prompts is not None else 0
        self._check_length(int(position_ids.max()) + 1 if position_ids is not None else position + tokens)
        step = BlockPass(
            length + position,
            session=cache.session,
            attention_mask=attention_mask,
            position_ids=counted,
            keep=self._pass.keep,
            caller_cache=cache,
        )
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (length, 0), value=1)
        arguments: dict[str, Any] = {"attention_mask": attention_mask}
        return step, arguments | ({"position_ids": position_ids + length} if position_ids is not None else {})

    def _after(self, owner: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = BlockPass.among(kwargs.values())
        if call is None or call.entered is None:
            raise UnsupportedModelError(
                f"{type(owner).__name__} of {versions()} does not pass its cache on to its blocks: their "
                "positions would be wrong; use a version of transformers that this package was tested with"
            )
        if isinstance(output, tuple):
            return tuple(value for value in output if value is not call)
        set_cache(output, call.caller_cache)
        return output

    def _after_layers(self, layers: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = BlockPass.among((*args, *kwargs.values()))
        if call is not None and call.rows is not None:
            self._pass.output = weakref.ref(output[0] if isinstance(output, tuple) else output)

    def _normalise(self, forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A norm of the owner. The norm after the blocks normalises only the positions that are read.

        All others are zeros there; normalising them took longer than the rest of this process's step.
        """
        rows, output = self.rows, self._pass.output
        if rows is None or output is None or hidden is not output():
            return forward(hidden, *args, **kwargs)
        return scatter_positions(forward(gather_positions(hidden, rows), *args, **kwargs), rows, *hidden.shape[:2])

    def _prefix_at_first_block(self) -> torch.Tensor | None:
        """The prefix's hidden states [P, H] before the first block; None without prompts, or if no block runs them."""
        if self._prompts is None or self._prompts.input is None:
            return None
        dtype = next(self._embeddings().parameters()).dtype
        return self.first_block_input(self._prompts.input.to(dtype)[None])[0]

    def _adapter(self) -> Adapter | None:
        """What the model adds inside of its blocks, with the current values; None if nothing."""
        deep = self._prompts.deep if self._prompts is not None else None
        lora = self._lora.factors() if self._lora is not None else ()
        past = self._prompts.past_parts() if self._prompts is not None else ()
        adapter = Adapter(0, len(self.layers), deep, lora, past=past, active=self._active)
        return adapter if not adapter.is_empty else None

    @torch.no_grad()
    def past_after(self, embeds: torch.Tensor) -> None:
        """Sets the trained prefix to the keys and values that the blocks make of embeddings [P, E]."""
        assert self._prompts is not None
        found = [
            PastKeyValues(part.blocks, part.keys.cpu().clone(), part.values.cpu().clone())
            for part in self._prompts.past_parts()
        ]
        dtype = next(self._embeddings().parameters()).dtype
        self.layers.fill_past(self.first_block_input(embeds.to(dtype)[None])[0], found)
        self._prompts.set_past(by_block(found))

    def _check(self, kwargs: dict[str, Any], cache: Any) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise UnsupportedInputError(
                    f"{name}=True: blocks run on servers, which return the last block's output only. "
                    "Leave it off, or run model.layers[a:b] piece by piece"
                )
        if isinstance(cache, RemoteCache):
            if self.rows is not None or torch.is_grad_enabled():
                raise UnsupportedInputError("an inference session gives no gradients: call it under torch.no_grad()")
            if (mask := kwargs.get("attention_mask")) is not None and mask.ndim != 2:
                raise UnsupportedInputError(f"attention_mask must be [B, T] of 0 and 1, got {tuple(mask.shape)}")
            return
        if cache is not None or kwargs.get("use_cache"):
            raise UnsupportedInputError(
                f"use_cache / {self.cache_name}: keys and values are kept on servers; call generate, or open an "
                f"inference_session and pass its `cache` as {self.cache_name}"
            )
        mask, positions = kwargs.get("attention_mask"), kwargs.pop("position_ids", None)
        if positions is not None:
            counted = torch.arange(positions.shape[-1], device=positions.device)
            is_read = mask.bool() if mask is not None and mask.shape == positions.shape else True
            if not ((positions == counted) | ~torch.as_tensor(is_read)).all():
                raise UnsupportedInputError("position_ids: servers number positions from the start; leave it off")
        if mask is not None:
            if mask.ndim != 2:
                raise UnsupportedInputError(f"attention_mask must be [B, S] of 0 and 1, got {tuple(mask.shape)}")
            if (mask[:, 1:] > mask[:, :-1]).any():
                raise UnsupportedInputError(
                    "attention_mask has padding on the left or inside: training through a swarm takes right padding "
                    "only; set tokenizer.padding_side = 'right'"
                )

    def _check_tokens(self, input_ids: torch.Tensor) -> None:
        """Checks token ids. A GPU would only report that some kernel failed, and the process could not go on."""
        known = next(self._embeddings().parameters()).shape[0]
        unknown = input_ids[(input_ids < 0) | (input_ids >= known)]
        if len(unknown):
            raise UnsupportedInputError(
                f"input_ids has the token {int(unknown[0])}, the model has embeddings for 0…{known - 1}: "
                "use the model's own tokenizer, without added tokens"
            )

    def _check_length(self, positions: int) -> None:
        prefix = self._prompts.pre_seq_len if self._prompts is not None else 0
        if self.max_positions is not None and prefix + positions > self.max_positions:
            raise UnsupportedInputError(
                f"{prefix} virtual tokens and {positions} tokens: this model has {self.max_positions} positions"
            )


def _padding(kwargs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    return {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
