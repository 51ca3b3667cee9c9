"""Linear modules with quantised, frozen weights: bitsandbytes packs them, and every pass computes with them unpacked.

Outputs and gradients are those of a model with the dequantised weights, up to rounding: they depend on nothing else in
the batch, and the backward multiplies by the same weights as the forward. bitsandbytes' own modules differ from that
(`python -m benchmarks.quantization` compares them): `Linear8bitLt` (LLM.int8(), Dettmers et al. 2022) rounds
activations to eight bits, too, and leaves out those columns that have a large value anywhere in the batch, while its
gradient is that of unrounded activations; `Linear4bit` repacks its weights in place on some CPUs when no gradient is
needed.

Shapes: K inputs and N outputs of a linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf.compat import Conv1D, is_bypassed
from petals_lightning.hf.linears import linear_shape
from petals_lightning.protocol.quant_types import UNQUANTIZED

_OLDEST = "0.50"  # of bitsandbytes: the first whose CPU kernels are tested here
_GROUP = 64  # weights that share a scale in nf4 (Dettmers et al. 2023, QLoRA, section 3)
_AT_ONCE = 1 << 22  # weights that are quantised at once, of which bitsandbytes' CPU code makes several float32 copies


def check_can_quantize(quant_type: str) -> None:
    """Raises ConfigurationError if bitsandbytes is missing or too old for this kind of weights."""
    if quant_type == UNQUANTIZED:
        return
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(_OLDEST):
        raise ConfigurationError(
            f"quant_type {quant_type} needs bitsandbytes {_OLDEST} or newer, "
            f"{f'this is {found}' if found else 'which is not installed'}: pip install 'petals-lightning[quantization]'"
        )


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a frozen weight W [N, K], kept as int8 or nf4.

    It takes the place of a linear without weights, on the meta device, and quantises W when that is assigned. Codes
    follow from the checkpoint's values alone, whatever the dtype of the passes.

    Args:
        linear: that it replaces.
        quant_type: int8, with a scale for each output, or nf4, with a scale for each 64 weights.
        device: where W is quantised and kept.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: nn.Parameter | None
    dtype: torch.dtype

    def __init__(self, linear: Any, quant_type: str, device: torch.device):
        super().__init__()
        shape = linear_shape(linear)
        assert shape is not None
        self.in_features, self.out_features = shape
        self.quant_type, self.dtype = quant_type, linear.weight.dtype
        self._device, self._is_transposed = device, isinstance(linear, Conv1D)
        self.register_buffer("codes", None)
        self.register_buffer("scales", None)
        self.register_parameter("bias", linear.bias)
        self.register_parameter("weight", nn.Parameter(linear.weight.detach().float(), requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Quantises the weight, instead of keeping it, when transformers assigns it."""
        if name != "weight" or param is None:
            super().register_parameter(name, param)
        elif param.is_meta:
            self._parameters[name] = param
        else:
            self._parameters.pop(name, None)
            weight = param.detach().t() if self._is_transposed else param.detach()
            self.codes, self.scales = _quantize(weight, self.quant_type, self._device)
            self._is_hf_initialized = True

    @property
    def weight(self) -> torch.Tensor:
        """W in the dtype of the model, for code that reads it without calling the module."""
        if (awaited := self._parameters.get("weight")) is not None:
            return awaited
        weight = self.dequantized(self.dtype)
        return weight.t() if self._is_transposed else weight

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """W [N, K] as these codes mean it."""
        import bitsandbytes.functional as bnb

        if self.quant_type == "int8":
            return bnb.int8_vectorwise_dequant(self.codes, self.scales).to(dtype)
        # As one row: with several, the CPU kernel of 0.50.2 takes wrong scales where K is no multiple of 64.
        flat = torch.Size((self.out_features * self.in_features,))
        state = bnb.QuantState(self.scales, flat, blocksize=_GROUP, quant_type="nf4", dtype=dtype)
        return bnb.dequantize_4bit(self.codes, state).view(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, K] to […, N]."""
        return _FrozenLinear.apply(input, self)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quant_type}"


class _FrozenLinear(torch.autograd.Function):
    """Keeps nothing for the backward, which dequantises the weight again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dequantized(x.dtype), linear.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.linear.dequantized(grad.dtype), None


def _quantize(weight: torch.Tensor, quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float32 scales of W [N, K], some rows at a time."""
    import bitsandbytes.functional as bnb

    rows = max(_GROUP, _AT_ONCE // weight.shape[1] // _GROUP * _GROUP)  # so that no group of nf4 is cut
    parts = []
    for some in weight.split(rows):
        some = some.to(device).contiguous()
        if quant_type == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(some.half())
        else:
            codes, state = bnb.quantize_4bit(some, blocksize=_GROUP, quant_type="nf4")
            scales = state.absmax
        parts.append((codes, scales))
    codes, scales = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
    return codes, scales


def quantize_linears(block: nn.Module, quant_type: str, device: torch.device, model_type: str) -> None:
    """Replaces the linears in a block, on the meta device, by quantised ones."""
    for path, linear in _quantizable(block, model_type):
        block.set_submodule(path, QuantizedLinear(linear, quant_type, device))


def bytes_of_block(block: nn.Module, itemsize: int, quant_type: str, model_type: str) -> int:
    """Bytes that a block's weights will take, of a block on the meta device that is not quantised yet.

    Args:
        itemsize: bytes of a value that is not quantised.
    """
    total = itemsize * sum(weight.numel() for weight in block.parameters())
    if quant_type == UNQUANTIZED:
        return total
    for _, linear in _quantizable(block, model_type):
        count, (_, outputs) = linear.weight.numel(), linear_shape(linear) or (0, 0)
        packed = count + 4 * outputs if quant_type == "int8" else -(-count // 2) + 4 * -(-count // _GROUP)
        total += packed - itemsize * count
    return total


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weights of a loaded module."""
    return sum(each.nbytes for each in module.parameters()) + sum(each.num_bytes for each in _quantized(module))


def quant_type_of(model: nn.Module) -> str:
    """How the weights of a loaded model's linears are quantised."""
    return next((each.quant_type for each in _quantized(model)), UNQUANTIZED)


def dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype of a model's passes, and where they run."""
    if (parameter := next(model.parameters(), None)) is not None:
        return parameter.dtype, parameter.device
    linear = next(_quantized(model))  # no norm has weights, and no linear a bias
    return linear.dtype, linear.codes.device


@contextmanager
def dequantized(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile, the quantised linears in these blocks are plain ones with the same, dequantised weights."""
    replaced = []
    try:
        for block in blocks:
            for path, linear in list(block.named_modules()):
                if isinstance(linear, QuantizedLinear):
                    plain: Any = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
                    plain.weight = nn.Parameter(linear.dequantized(linear.dtype), requires_grad=False)
                    plain.bias = linear.bias
                    block.set_submodule(path, plain)
                    replaced.append((block, path, linear))
        yield
    finally:
        for block, path, linear in replaced:
            block.set_submodule(path, linear)


def _quantized(module: nn.Module) -> Iterator[QuantizedLinear]:
    return (each for each in module.modules() if isinstance(each, QuantizedLinear))


def _quantizable(module: nn.Module, model_type: str) -> list[tuple[str, Any]]:
    return [
        (path, each)
        for path, each in module.named_modules()
        if (type(each) is nn.Linear or isinstance(each, Conv1D)) and not is_bypassed(model_type, path)
    ]
