"""What trains in a frozen model: attached prompts and the head, their start values, and their checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_lightning.hf.skeleton import BlockLayout, num_blocks
from petals_lightning.models.prompts import Prompts, TuningMode


class FrozenBody:
    """Mixed into a family's class: `train()` leaves the frozen parts in eval mode. Their dropout would make servers'
    and local results differ, and gradients noisy for nothing."""

    def train(self, mode: bool = True) -> Any:
        super().train(False)  # type: ignore[misc]
        self.training = mode
        return self


def attach_trainable(
    model: PreTrainedModel, layout: BlockLayout, tuning_mode: TuningMode | None, pre_seq_len: int | None
) -> None:
    """Freezes the model, attaches `prompts` to its owner and makes its task head (if it has a fresh one) trainable.

    Prompts and head are float32 whatever the model's dtype. They are drawn from torch's global generator, prompts
    first, so that one seed gives one start for local and distributed models alike.
    """
    model.requires_grad_(False)
    owner = layout.owner(model)
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    config = model.config.get_text_config()
    if tuning_mode is not None:
        assert pre_seq_len is not None, "checked by check_tuning"
        prompts = Prompts(
            tuning_mode,
            pre_seq_len,
            embedding_size=embedding.shape[1],
            hidden_size=config.hidden_size,
            num_blocks=num_blocks(config),
        ).to(embedding.device)
        prompts.reset_parameters(embedding.float().std().item())
        owner.prompts = prompts
    for head in _heads(model):
        head.float().requires_grad_(True)
        for name, parameter in head.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, getattr(config, "initializer_range", None) or 0.02)
        head.register_forward_pre_hook(_cast_to_weight)


def prompts_of(model: nn.Module) -> Any:
    """The `Prompts` attached to a model, or None."""
    return next((module for module in model.modules() if isinstance(module, Prompts)), None)


def trainable_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name and value of every parameter that trains: kilobytes, whatever the model's size."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """The classification head: what a task model has beside its base model, unless that is the language-model head."""
    if model.base_model is model or model.can_generate():
        return []
    return [
        child for child in model.children() if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _cast_to_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
