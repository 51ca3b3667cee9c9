"""The linear modules of a model, and what LoRA adds to one."""

from __future__ import annotations

import torch
from torch import nn

from petals_lightning.hf.compat import Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs K and outputs O of a linear module, as PEFT counts them; None for any other module.

    Quantised linears count too: they are named so, and state both numbers.
    """
    if isinstance(module, Conv1D):  # GPT-2's: a linear whose weight is [K, O]
        return module.weight.shape[0], module.weight.shape[1]
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    is_linear = isinstance(module, nn.Linear) or "Linear" in type(module).__name__
    return (inputs, outputs) if is_linear and type(inputs) is int and type(outputs) is int else None


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear modules inside of a module, by path, in the order of `named_modules`."""
    return {path: each for path, each in module.named_modules() if linear_shape(each) is not None}


def add_low_rank(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The output of a linear with LoRA: y + (x Aᵀ) Bᵀ, all in the dtype and on the device of y.

    Args:
        x: [.., K], the linear's input.
        y: [.., O], its own output.
        a: [r, K].
        b: [O, r], with PEFT's scale.
    """
    x, a, b = (tensor.to(y) for tensor in (x, a, b))
    return y + nn.functional.linear(nn.functional.linear(x, a), b)
