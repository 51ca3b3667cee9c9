"""LoRA of PEFT's own model, to compare with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def by_peft(checkpoint: Path | str, config: LoraConfig, auto: Any = AutoModelForCausalLM, **options: Any) -> PeftModel:
    """PEFT's model on the local one, with B moved off zero; without the head, which is compared by itself."""
    model = auto.from_pretrained(str(checkpoint), **options)
    torch.manual_seed(1)  # not before loading: some families also draw what they then read
    if hasattr(model, "score"):  # drawn when a model is loaded, so before LoRA
        torch.nn.init.normal_(model.score.weight, 0.0, 0.02)
    model = get_peft_model(model, copy.deepcopy(config))
    move_off_zero(dict(factors_of_peft(model)))
    return model


def factors_of_peft(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """PEFT's factors by the names of ours, from the block's number on."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.removesuffix(".default.weight").split(".")
            first = next(place for place, part in enumerate(parts) if part.isdigit())
            found[".".join(parts[first:])] = parameter
    return found


def move_off_zero(factors: dict[str, torch.nn.Parameter], std: float = 0.3) -> None:
    """Draws every B, so that A has a gradient; by name, so that all models draw the same."""
    with torch.no_grad():
        for number, name in enumerate(sorted(name for name in factors if name.endswith("lora_B"))):
            factors[name].normal_(0, std, generator=torch.Generator().manual_seed(number))


def causal_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the real tokens, and all logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()), logits
