"""Blockwise 8-bit quantisation: every 64 neighbours in a row share a scale.

An outlier therefore reduces only its neighbours' precision.

Absolute-maximum quantisation in blocks, as in Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"
(arXiv:2110.02861), but with evenly spaced codes. Their dynamic codes are finer only if a few values dwarf their block,
and took 80 times as long to compute on a CPU.

Blocks never cross rows, so the result for a position does not depend on the others that are sent with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BLOCK_SIZE = 64
_MAX_CODE = 127


def quantized_size(shape: Sequence[int]) -> int:
    """Bytes of a quantised tensor of this shape (at least one dimension): codes and scales."""
    return math.prod(shape) + 4 * _num_blocks(shape)


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a floating tensor of one or more dimensions.

    Returns:
        Codes (int8, in its shape) and scales (float32, one per block). A code times its block's scale differs from the
        value by at most half a scale, which is 1/254 of the block's largest value. A block with any value that is not
        finite becomes NaN throughout.
    """
    blocks = _in_blocks(tensor.float())
    scales = blocks.abs().amax(-1, keepdim=True).div_(_MAX_CODE)
    scales.masked_fill_(~scales.isfinite(), math.nan)
    # A scale of 0 gives 0 / 0, and zeros get code 0. NaN may get code 0 too, because its block's scale is NaN.
    codes = (blocks / scales).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-_MAX_CODE, _MAX_CODE).to(torch.int8)
    codes = codes.flatten(-2)[..., : tensor.shape[-1]]
    return codes.contiguous(), scales.reshape(-1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 tensor of these codes and scales. Needs no memory besides the result: peers choose the shape."""
    values = codes.float()
    whole = values.shape[-1] // BLOCK_SIZE
    scales = scales.view(*values.shape[:-1], _num_blocks(values.shape[-1:]))
    values[..., : whole * BLOCK_SIZE].unflatten(-1, (whole, BLOCK_SIZE)).mul_(scales[..., :whole, None])
    values[..., whole * BLOCK_SIZE :].mul_(scales[..., whole:])
    return values


def _num_blocks(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / BLOCK_SIZE)


def _in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Reshapes […, n] to […, blocks, BLOCK_SIZE], padded with zeros."""
    padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % BLOCK_SIZE))
    return padded.view(*tensor.shape[:-1], -1 if padded.numel() else _num_blocks(tensor.shape[-1:]), BLOCK_SIZE)
