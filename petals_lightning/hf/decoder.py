"""The text decoder of a checkpoint: its class, and the names that the checkpoint has for its tensors.

A multimodal wrapper (Gemma 3, Qwen2-VL, LLaVA, …) holds a text decoder beside its towers. Only that is loaded, as the
class that the text part has by itself; its tensors are found by building the wrapper's own class without weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin
from torch import nn

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.checkpoint import Checkpoint, first_line
from petals_lightning.hf.compat import GenericForSequenceClassification, class_for, quiet_transformers, renamed_keys


def model_class(auto_class: Any, checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The class that `auto_class` (`AutoModel`, …) would pick for the checkpoint's text decoder.

    Raises:
        UnsupportedModelError: the family has no such class.
    """
    config = checkpoint.decoder_config
    found = class_for(auto_class, type(config))
    if found is None and checkpoint.is_wrapper:
        base = class_for(AutoModel, type(config)) or type(text_decoder_in(_wrapper(checkpoint), config)[1])
        found = base if auto_class is AutoModel else _with_head(auto_class, base)
    if found is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} of {checkpoint.name_or_path!r} has no class for {auto_class.__name__}"
        )
    return found


def names_in_decoder(cls: type[PreTrainedModel], checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """For the checkpoint's tensors, their paths in `model`, an instance of `cls`; those of a wrapper's towers are left out.

    The paths may lack the prefix of the base model, or have one that the model has not.
    """
    config, names = checkpoint.decoder_config, checkpoint.shard_of
    if not checkpoint.is_wrapper:
        return renamed_keys(model, names)
    wrapper = _wrapper(checkpoint)
    path, _ = text_decoder_in(wrapper, config)
    prefix = wrapper.base_model_prefix
    inside = re.compile(rf"^(?:{re.escape(prefix)}\.)?{re.escape(path.removeprefix(f'{prefix}.'))}\.(.+)$")
    base = f"{cls.base_model_prefix}." if model.base_model is not model else ""
    found = {}
    heads = _head_path(wrapper), _head_path(model)
    for name, renamed in renamed_keys(wrapper, names).items():
        if (match := inside.match(renamed)) is not None:
            found[name] = base + match[1]
        elif None not in heads and renamed.startswith(f"{heads[0]}."):
            found[name] = f"{heads[1]}{renamed.removeprefix(str(heads[0]))}"
    return found


def _wrapper(checkpoint: Checkpoint) -> PreTrainedModel:
    """The multimodal model that a checkpoint is of, without weights.

    Raises:
        UnsupportedModelError: transformers has no class for it, or cannot make it.
    """
    config = copy.deepcopy(checkpoint.config)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
        if (cls := class_for(auto_class, type(config))) is not None:
            break
    else:
        raise UnsupportedModelError(f"model type {config.model_type!r} of {checkpoint.name_or_path!r} has no class")
    try:
        with torch.device("meta"), quiet_transformers():
            return cls(config)
    except Exception as e:  # whatever a family's own code raises
        raise UnsupportedModelError(
            f"{cls.__name__}, the class of {checkpoint.name_or_path!r}, cannot be made: {first_line(e)}"
        ) from e


def text_decoder_in(wrapper: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, PreTrainedModel]:
    """Path and module of the text decoder in a wrapper.

    Raises:
        UnsupportedModelError: there is none.
    """
    for path, module in wrapper.named_modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(config):
            base = module.base_model
            return (path, module) if base is module else (f"{path}.{module.base_model_prefix}", base)
    raise UnsupportedModelError(f"{type(wrapper).__name__} has no text decoder of {type(config).__name__}")


def _head_path(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _with_head(auto_class: Any, base: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """A class for a text decoder to which transformers gives a head in its wrapper only.

    It is put together from transformers' own parts: the family's base class, a linear head, a forward that is generic.
    """
    family = next(cls for cls in base.__mro__[1:] if issubclass(cls, PreTrainedModel))

    def causal(self: Any, config: PreTrainedConfig) -> None:
        family.__init__(self, config)
        self.model, self.vocab_size = base(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def classifier(self: Any, config: PreTrainedConfig) -> None:
        family.__init__(self, config)
        self.model, self.num_labels = base(config), config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    name = base.__name__.removesuffix("Model")
    common = {"__module__": base.__module__, "config_class": base.config_class, "base_model_prefix": "model"}
    if auto_class is AutoModelForCausalLM:
        tied = {"lm_head.weight": "model.embed_tokens.weight"}
        parts = {"__init__": causal, "forward": LlamaForCausalLM.forward, "_tied_weights_keys": tied}
        return type(f"{name}ForCausalLM", (family, GenerationMixin), common | parts)
    if auto_class is AutoModelForSequenceClassification:
        parts = {"__init__": classifier, "forward": GenericForSequenceClassification.forward}
        return type(f"{name}ForSequenceClassification", (family,), common | parts)
    return None
