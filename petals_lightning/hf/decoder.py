"""The text decoder of a checkpoint: its class, and the checkpoint's names of its tensors.

A multimodal wrapper (Gemma 3, Qwen2-VL, LLaVA, …) contains a text decoder and towers. Only the decoder is loaded, as
its own class. Its tensors are found by building the wrapper's class without weights.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.checkpoint import Checkpoint, refusing
from petals_lightning.hf.compat import (
    GenericForSequenceClassification,
    class_for,
    quiet_transformers,
    renamed_keys,
    share_conversions,
)


def model_class(auto_class: Any, checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The class that `auto_class` (`AutoModel`, …) would pick for the checkpoint's text decoder.

    Raises:
        UnsupportedModelError: the family has no such class, or its wrapper computes logits differently.
    """
    config = checkpoint.decoder_config
    found = class_for(auto_class, type(config))
    if checkpoint.is_wrapper and (found is None or auto_class is AutoModelForCausalLM):
        wrapper = wrapper_of(checkpoint)
        base = class_for(AutoModel, type(config)) or type(text_decoder_in(wrapper, config)[1])
        if auto_class is AutoModel:
            found = base
        elif auto_class is AutoModelForSequenceClassification:
            found = _classifier(base)
        elif auto_class is AutoModelForCausalLM:
            found = _causal_class(wrapper, config, [found] if found is not None else [], base)
    if found is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} of {checkpoint.name_or_path!r} has no class for {auto_class.__name__}"
        )
    return found


def names_in_decoder(cls: type[PreTrainedModel], checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """For the checkpoint's tensors, their paths in `model`, an instance of `cls`; a wrapper's towers are left out.

    The paths may lack the base model's prefix, or have one that the model lacks.
    """
    config, names = checkpoint.decoder_config, checkpoint.shard_of
    if not checkpoint.is_wrapper:
        return renamed_keys(model, names)
    wrapper = wrapper_of(checkpoint)
    share_conversions(wrapper, model)
    path, _ = text_decoder_in(wrapper, config)
    prefix = wrapper.base_model_prefix
    inside = re.compile(rf"^(?:{re.escape(prefix)}\.)?{re.escape(path.removeprefix(f'{prefix}.'))}\.(.+)$")
    base, _ = text_decoder_in(model, config)
    base = f"{base}." if base else ""
    found = {}
    heads = _head_path(wrapper), _head_path(model)
    for name, renamed in renamed_keys(wrapper, names).items():
        if (match := inside.match(renamed)) is not None:
            found[name] = base + match[1]
        elif None not in heads and renamed.startswith(f"{heads[0]}."):
            found[name] = f"{heads[1]}{renamed.removeprefix(str(heads[0]))}"
    return found


def wrapper_of(checkpoint: Checkpoint) -> PreTrainedModel:
    """The multimodal model of a checkpoint, without weights.

    Raises:
        UnsupportedModelError: transformers has no class for the model, or cannot build it.
    """
    config = copy.deepcopy(checkpoint.config)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
        if (cls := class_for(auto_class, type(config))) is not None:
            break
    else:
        raise UnsupportedModelError(f"model type {config.model_type!r} of {checkpoint.name_or_path!r} has no class")
    with refusing(f"{cls.__name__} cannot be built"), torch.device("meta"), quiet_transformers():
        return cls(config)


def text_decoder_in(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[str, PreTrainedModel]:
    """Path and module of the decoder without a head that `config` describes, inside a wrapper or a model with a head.

    Raises:
        UnsupportedModelError: there is no such decoder.
    """
    parts = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and isinstance(module.config, type(config))
    ]
    base = class_for(AutoModel, type(config))
    for path, module in parts:
        if base is not None and isinstance(module, base):
            return path, module
    for path, module in parts:  # a family unknown to AutoModel
        inner: Any = module.base_model
        return (path, module) if inner is module else (f"{path}.{module.base_model_prefix}".strip("."), inner)
    raise UnsupportedModelError(f"{type(model).__name__} has no text decoder of {type(config).__name__}")


def _head_path(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _causal_class(
    wrapper: PreTrainedModel, config: PreTrainedConfig, found: list[type[PreTrainedModel]], base: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    """The class that computes logits as `wrapper` does: the text part's own (`found`), or one with a plain linear head.

    They differ if a wrapper omits what the text part's own class does, such as Cohere's scaling of the logits.
    """
    if "." in str(_head_path(wrapper)) and found:  # the wrapper holds the text part with its head
        return found[0]
    expected = _trial_logits(wrapper)
    if expected is None and found:  # the wrapper takes no texts
        return found[0]
    for cls in (*found, _plain_causal(base)):
        with torch.device("meta"), quiet_transformers():
            model = cls(copy.deepcopy(config))
        logits = _trial_logits(model)
        if expected is not None and logits is not None and torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
            return cls
    raise UnsupportedModelError(
        f"{type(wrapper).__name__} ({wrapper.config.model_type}) computes logits in a way of its own, which its text "
        "decoder alone does not have"
    )


def _trial_logits(model: PreTrainedModel) -> torch.Tensor | None:
    """Logits [1, S, V] of a model without weights for given hidden states; None if its code does not run that way."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().hidden_size
    hidden, path = torch.randn(1, 3, size, generator=generator), _head_path(model)
    head = nn.Linear(size, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, size, generator=generator))
    setattr(model, model.base_model_prefix, _Given(hidden))
    setattr(model, str(path), head)
    try:
        with torch.no_grad():
            return model.eval()(input_ids=torch.ones(1, 3, dtype=torch.long)).logits
    except Exception:  # the family's own code may raise anything
        return None


class _Given(nn.Module):
    """A stand-in for a base model."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.hidden)


class _Output:
    """The output of a base model: hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def _plain_causal(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A text decoder with a linear head, composed of transformers' own parts."""
    family = next(cls for cls in base.__mro__[1:] if issubclass(cls, PreTrainedModel))

    def init(self: Any, config: Any) -> None:
        family.__init__(self, config)
        self.model, self.vocab_size = base(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    return type(
        f"{base.__name__.removesuffix('Model')}ForCausalLM",
        (family, GenerationMixin),
        {
            "__module__": base.__module__,
            "__init__": init,
            "forward": LlamaForCausalLM.forward,
            "config_class": base.config_class,
            "base_model_prefix": "model",
            "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
        },
    )


def _classifier(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A text decoder with the usual classification head, composed of transformers' own parts."""
    family = next(cls for cls in base.__mro__[1:] if issubclass(cls, PreTrainedModel))

    def init(self: Any, config: Any) -> None:
        family.__init__(self, config)
        self.model, self.num_labels = base(config), config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    return type(
        f"{base.__name__.removesuffix('Model')}ForSequenceClassification",
        (family,),
        {
            "__module__": base.__module__,
            "__init__": init,
            "forward": GenericForSequenceClassification.forward,
            "config_class": base.config_class,
            "base_model_prefix": "model",
        },
    )
