"""The same models without a swarm: all blocks in this process, plain Hugging Face, with the prefix in front.

The reference for distributed training in tests and benchmarks, and for anyone with a small model (`swarm=none`).
Parameters have the same names and, for a given seed, the same initial values as in the distributed classes.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf import Checkpoint, ModelSlice, find_blocks, load_pruned
from petals_lightning.hf.compat import cache_name, cache_of, past_of, pop_cache, quiet_transformers, set_cache
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.loading import check_pad_token, fresh_parameters
from petals_lightning.hf.past_shapes import past_shapes
from petals_lightning.hf.pruning import BlockLayout, num_blocks
from petals_lightning.models.adapter_files import adapter_settings, find_active_adapter, load_adapter
from petals_lightning.models.arguments import config_overrides
from petals_lightning.models.lora import add_frozen, lora_settings
from petals_lightning.models.prompt_files import load_prompts, tuning_of
from petals_lightning.models.prompts import PROMPT_MODES, Prompts, TuningMode
from petals_lightning.models.starts import PromptInit, PromptStart, check_start
from petals_lightning.models.trainable import (
    FrozenBackbone,
    attach_trainable,
    has_head_of_its_own,
    lora_of,
    parameters_to_draw,
)


class _LocalModel:
    auto_class: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int | None = None,
        prompt_init: PromptInit = "random",
        prompt_init_text: str | None = None,
        lora: Any = None,
        prompts: str | Path | None = None,
        adapter: str | Path | None = None,
        active_adapter: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        token: str | bool | None = None,
        revision: str | None = None,
        **config_values: Any,
    ) -> Any:
        """Loads the whole model; everything but prompts, LoRA and head is frozen.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            tuning_mode: None, "ptune", "deep_ptune", "prefix" or "lora".
            pre_seq_len: P, the number of virtual tokens.
            prompt_init, prompt_init_text: the start of prompts, as in the distributed classes.
            lora, adapter: as in the distributed classes.
            active_adapter: folder or hub id of LoRA in PEFT's format that acts without being trained.
            prompts: folder (`save_prompts`) or hub id of tuned prompts, which determine mode and number.
            dtype: of the frozen weights; "auto" is the checkpoint's dtype.
            token, revision: as in transformers.
            config_values: values to set on the config, e.g. `num_labels`.

        Raises:
            ConfigurationError, CheckpointError, UnsupportedModelError: as the distributed classes.
        """
        tuning_mode, pre_seq_len = tuning_of(prompts, tuning_mode, pre_seq_len, token=token)
        if adapter is not None:
            tuning_mode, lora = tuning_mode or "lora", adapter_settings(adapter, lora, token=token)
        check_start(prompt_init, prompt_init_text, tuning_mode, loads_prompts=prompts is not None)
        lora_config = lora_settings(tuning_mode, lora)
        checkpoint = Checkpoint(str(pretrained_model_name_or_path), token=token, revision=revision)
        config = copy.deepcopy(checkpoint.config)
        overrides = config_overrides(
            checkpoint.decoder_config, config_values, inspect.signature(cls.from_pretrained).parameters
        )
        for name, value in overrides.items():
            setattr(config, name, value)
        check_pad_token(config)
        start = PromptStart.read(prompt_init, prompt_init_text, pre_seq_len, checkpoint)
        with (
            torch.random.fork_rng(devices=[]),
            quiet_transformers(),
        ):  # loading must not advance the generator that draws initial values
            if checkpoint.is_wrapper:  # only its text decoder is used
                family = model_class(cls.auto_class, checkpoint)
                whole = load_pruned(
                    family,
                    checkpoint,
                    ModelSlice(0, num_blocks(config), with_embeddings_and_head=True),
                    dtype=dtype,
                    config_overrides=overrides,
                    may_miss=has_head_of_its_own(family),
                )
                model, fresh = cast(Any, whole.model), whole.fresh
            else:
                checkpoint.check_shards()  # transformers would raise a bare traceback
                model, info = cls.auto_class.from_pretrained(
                    checkpoint.name_or_path,
                    config=config,
                    dtype=dtype,
                    token=token,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # `fresh_parameters` reports them
                    **({"revision": revision} if revision else {}),
                )
                family = type(model)
                fresh = fresh_parameters(family, checkpoint, info, has_head_of_its_own(family))
        model.__class__ = type(family.__name__, (FrozenBackbone, family), {"__module__": family.__module__})
        layout = find_blocks(model)
        drawn = parameters_to_draw(model, checkpoint, fresh)
        shapes = past_shapes(model, layout, layout.blocks(model)) if tuning_mode == "prefix" else None
        tokens = attach_trainable(model, layout, tuning_mode, pre_seq_len, lora_config, drawn, start, shapes)
        if tuning_mode == "prefix":
            prepend_past(model, layout, tokens)
        elif tuning_mode in PROMPT_MODES:
            concatenate_prompts(model, layout)
        if active_adapter is not None:
            active = find_active_adapter(active_adapter, layout, num_blocks(config), needs_copy=True, token=token)
            add_frozen(active.lora, layout.blocks(model))
        if (own := lora_of(model)) is not None:
            own.adapt(layout.blocks(model))
        model.checkpoint, model.max_positions = checkpoint, layout.max_positions
        if prompts is not None:
            load_prompts(model, prompts, token=token)
        if adapter is not None:
            load_adapter(model, adapter, token=token)
        return model


class LocalModel(_LocalModel):
    auto_class = AutoModel


class LocalModelForCausalLM(_LocalModel):
    auto_class = AutoModelForCausalLM


class LocalModelForSequenceClassification(_LocalModel):
    auto_class = AutoModelForSequenceClassification


def prepend_past(model: PreTrainedModel, layout: BlockLayout, tokens: torch.Tensor | None) -> None:
    """Adds a hook that passes the owner's prefix to it, as a cache that holds its keys and values.

    Args:
        tokens: [P, E] embeddings whose keys and values are the first ones; None: those are set.
    """
    owner = layout.owner(model)
    prompts, name = owner.prompts, cache_name(owner)
    dtype = next(model.get_input_embeddings().parameters()).dtype
    if tokens is not None:
        cache = cache_of()
        with torch.no_grad():
            owner(inputs_embeds=tokens.to(dtype)[None], use_cache=True, **{name: cache})
        prompts.set_past([(keys[0], values[0]) for keys, values in past_of(cache)])

    def add_past(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if prompts.is_off:
            return None
        if pop_cache(kwargs) is not None:
            raise UnsupportedInputError("this model passes its own cache, with the prefix: leave it off")
        batch = len(
            next(each for each in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if each is not None)
        )
        pairs = [[tensor.to(dtype).expand(batch, -1, -1, -1) for tensor in pair] for pair in prompts.past_by_block()]
        kwargs |= {name: cache_of((keys, values) for keys, values in pairs), "use_cache": True}
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), prompts.pre_seq_len), mask], dim=1)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions + prompts.pre_seq_len
        return args, kwargs

    def drop_cache(module: nn.Module, args: Any, output: Any) -> Any:
        if not prompts.is_off:
            set_cache(output, None)
        return output

    owner.register_forward_pre_hook(add_past, with_kwargs=True)
    owner.register_forward_hook(drop_cache)


def concatenate_prompts(model: PreTrainedModel, layout: BlockLayout) -> None:
    """Adds hooks that run the owner's `prompts`: before the input as a prefix, and added to it before each block."""
    owner = layout.owner(model)
    prompts: Prompts = owner.prompts

    def add_prefix(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if prompts.is_off:
            return None
        if args:
            kwargs["input_ids"], args = args[0], args[1:]
        input_ids, embeds = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        if embeds is None:
            embeds = model.get_input_embeddings()(input_ids)
        assert prompts.input is not None
        prefix = prompts.input.to(embeds.dtype).expand(len(embeds), -1, -1)
        kwargs["inputs_embeds"] = torch.cat([prefix, embeds], dim=1)
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), prompts.pre_seq_len), mask], dim=1)
        if (positions := kwargs.get("position_ids")) is not None:
            counted = torch.arange(prompts.pre_seq_len, device=positions.device).expand(len(positions), -1)
            kwargs["position_ids"] = torch.cat([counted, positions + prompts.pre_seq_len], dim=1)
        return args, kwargs

    def strip_prefix(module: nn.Module, args: Any, output: Any) -> Any:
        if prompts.is_off:
            return None
        output.last_hidden_state = output.last_hidden_state[:, prompts.pre_seq_len :]
        return output

    owner.register_forward_pre_hook(add_prefix, with_kwargs=True)
    owner.register_forward_hook(strip_prefix)
    if prompts.deep is None:
        return

    def add_deep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if prompts.is_off:
                return None
            hidden = args[0]
            assert prompts.deep is not None
            deep = prompts.deep[index].to(hidden.dtype)
            return (hidden + nn.functional.pad(deep, (0, 0, 0, hidden.shape[1] - len(deep))), *args[1:])

        return hook

    for index, block in enumerate(layout.blocks(model)):
        block.register_forward_pre_hook(add_deep(index))
