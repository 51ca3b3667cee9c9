"""The trainable parts of a frozen model: attached prompts and the head, their initial values, and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from petals_lightning.hf.checkpoint import Checkpoint
from petals_lightning.hf.lora import LoraConfig
from petals_lightning.hf.past_shapes import PastShape
from petals_lightning.hf.pruning import BlockLayout, num_blocks
from petals_lightning.models.lora import Lora, LoraLinear
from petals_lightning.models.prompts import PROMPT_MODES, Prompts, TuningMode
from petals_lightning.models.starts import PromptStart, start_prompts

logger = logging.getLogger(__name__)


class FrozenBackbone:
    """Mixin for a family's class: `train()` leaves the frozen parts in eval mode.

    Their dropout would make servers' and local results differ, and would only add noise to gradients.
    """

    def train(self, mode: bool = True) -> Any:
        super().train(False)  # type: ignore[misc]
        self.training = mode
        return self


def attach_trainable(
    model: PreTrainedModel,
    layout: BlockLayout,
    tuning_mode: TuningMode | None,
    pre_seq_len: int | None,
    lora: LoraConfig | None,
    drawn: frozenset[str],
    start: PromptStart,
    past_shapes: Mapping[int, PastShape] | None = None,
) -> torch.Tensor | None:
    """Freezes the model, attaches `prompts` and `lora` to its owner and makes its task head (if it has one) trainable.

    All are float32 whatever the model's dtype. Prompts, the head and LoRA are drawn from torch's global generator in
    this order, so that one seed gives one start for local and distributed models alike, and PEFT's for LoRA: PEFT adds
    it to a model that has its head.

    Args:
        lora: its settings; None for none.
        drawn: names of the head's parameters to draw; the others keep the checkpoint's values.
        start: the first values of prompts.
        past_shapes: of a prefix.

    Returns:
        As `start_prompts`.
    """
    tokens = None
    model.requires_grad_(False)
    owner = layout.owner(model)
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    config = model.config.get_text_config()
    if tuning_mode in PROMPT_MODES:
        assert pre_seq_len is not None, "checked by check_tuning"
        prompts = Prompts(
            tuning_mode,
            pre_seq_len,
            embedding_size=embedding.shape[1],
            hidden_size=config.hidden_size,
            num_blocks=num_blocks(config),
            past_shapes=past_shapes,
        ).to(embedding.device)
        tokens = start_prompts(prompts, start, model.get_input_embeddings())
        owner.prompts = prompts
    for head_name, head in _heads(model):
        head.float().requires_grad_(True)
        for name, parameter in head.named_parameters():
            if f"{head_name}.{name}" not in drawn:
                continue
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, getattr(config, "initializer_range", None) or 0.02)
        head.register_forward_pre_hook(_cast_to_weight)
    if lora is not None:
        owner.lora = Lora(lora, layout).to(embedding.device)
    return tokens


def has_head_of_its_own(family: type[PreTrainedModel]) -> Callable[[str], bool]:
    """A test by name whether a parameter of a family's task model belongs to a head that may be drawn.

    A language model's head may not be drawn: it would generate random text.
    """
    if family.can_generate():
        return lambda name: False
    return lambda name: not name.startswith(f"{family.base_model_prefix}.")


def parameters_to_draw(model: PreTrainedModel, checkpoint: Checkpoint, fresh: frozenset[str]) -> frozenset[str]:
    """Names of the head's parameters to draw: all that are fresh, and all of a head for other classes.

    A head of the checkpoint is kept if its classes equal the model's, by number and, if both have names, by name. The
    log reports a head that is not kept.

    Args:
        fresh: parameters that the checkpoint lacks, see `LoadedPart`.
    """
    head = head_parameters(model).keys()
    if not any(name in checkpoint.shard_of for name in head):
        return fresh
    saved, expected = _class_names(checkpoint.config), _class_names(model.config)
    is_for_them = saved == expected or (len(saved) == len(expected) and (_are_numbers(saved) or _are_numbers(expected)))
    if is_for_them and not fresh & head:
        logger.info("the classification head of %s is trained on", checkpoint.name_or_path)
        return fresh
    logger.warning(
        "the classification head of %s is for the classes %s, this one for %s: a new one is drawn",
        checkpoint.name_or_path, ", ".join(saved.values()), ", ".join(expected.values()),
    )  # fmt: skip
    return fresh | head


def _class_names(config: PreTrainedConfig) -> dict[int, str]:
    return {int(number): str(name) for number, name in (config.id2label or {}).items()}


def _are_numbers(names: Mapping[int, str]) -> bool:
    """Whether the classes are only numbered, without names."""
    return all(name in (f"LABEL_{number}", str(number)) for number, name in names.items())


def share_frozen(model: nn.Module, other: nn.Module) -> None:
    """Makes frozen parameters and buffers of `model` those of `other`, which was loaded from the same checkpoint."""
    theirs = dict(other.named_parameters()) | dict(other.named_buffers())
    for name, own in [*model.named_parameters(), *model.named_buffers()]:
        if not own.requires_grad and name in theirs and theirs[name].shape == own.shape:
            own.data = theirs[name].data


def prompts_of(model: nn.Module) -> Any:
    """The `Prompts` attached to a model, or None."""
    return next((module for module in model.modules() if isinstance(module, Prompts)), None)


def lora_of(model: nn.Module) -> Any:
    """The `Lora` attached to a model, or None."""
    return next((module for module in model.modules() if isinstance(module, Lora)), None)


@contextmanager
def without_tuning(model: nn.Module) -> Iterator[None]:
    """Within it, passes are those of the frozen model, without the prompts and the LoRA that are trained.

    An adapter that is only active still acts, and so does a head.
    """
    tuning: Any = [module for module in model.modules() if isinstance(module, (Prompts, Lora, LoraLinear))]
    for module in tuning:
        module.is_off = True
    try:
        yield
    finally:
        for module in tuning:
            module.is_off = False


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of the classification head by their names in the model; empty without one."""
    return {f"{path}.{name}": weight for path, head in _heads(model) for name, weight in head.named_parameters()}


def trainable_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Names and values of all trainable parameters: kilobytes, whatever the model's size."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameters_by_kind(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters: `head`, `deep` (prompts that are added in every block) and `input`, which is all others.

    Kinds without parameters are left out.
    """
    in_head = {id(parameter) for parameter in head_parameters(model).values()}
    prompts = prompts_of(model)
    kinds: dict[str, list[nn.Parameter]] = {"input": [], "deep": [], "head": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_deep = prompts is not None and parameter is prompts.deep
            kinds["head" if id(parameter) in in_head else "deep" if is_deep else "input"].append(parameter)
    return {kind: parameters for kind, parameters in kinds.items() if parameters}


def _heads(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The classification head: the task model's modules outside of its base model, except a language-model head."""
    if model.base_model is model or model.can_generate():
        return []
    return [
        (name, child)
        for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _cast_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
