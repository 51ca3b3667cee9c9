"""Blockwise 8-bit quantisation: every 64 neighbours in a row share a scale.

So an outlier costs only its neighbours their precision.

Absolute-maximum quantisation in blocks, as Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"
(arXiv:2110.02861), with evenly spaced codes in place of their dynamic ones: those are finer only where a few values
dwarf their block, and took 80 times as long to find on a CPU.

Blocks never cross rows: what becomes of a position does not depend on which others travel with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BLOCK_SIZE = 64
_MAX_CODE = 127


def quantized_size(shape: Sequence[int]) -> int:
    """Bytes of a tensor of this shape (one dimension at least) in 8 bits: its codes and its scales."""
    return math.prod(shape) + 4 * _num_blocks(shape)


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A floating tensor of one dimension or more as codes (int8, in its shape) and scales (float32, one a block).

    A value is its code times its block's scale, to half the scale: at most 1/254 of the block's largest value off.
    A block in which any value is not finite comes back as NaN throughout.
    """
    blocks = _in_blocks(tensor.float())
    scales = blocks.abs().amax(-1, keepdim=True).div_(_MAX_CODE)
    scales.masked_fill_(~scales.isfinite(), math.nan)
    # A scale of 0 gives 0 / 0: the codes of zeros are 0. (So may be those of NaN: their scale says it.)
    codes = (blocks / scales).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(-_MAX_CODE, _MAX_CODE).to(torch.int8)
    codes = codes.flatten(-2)[..., : tensor.shape[-1]]
    return codes.contiguous(), scales.reshape(-1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 tensor that `quantize` gave these for. Takes no more memory than that: peers choose the shape."""
    values = codes.float()
    whole = values.shape[-1] // BLOCK_SIZE
    scales = scales.view(*values.shape[:-1], _num_blocks(values.shape[-1:]))
    values[..., : whole * BLOCK_SIZE].unflatten(-1, (whole, BLOCK_SIZE)).mul_(scales[..., :whole, None])
    values[..., whole * BLOCK_SIZE :].mul_(scales[..., whole:])
    return values


def _num_blocks(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / BLOCK_SIZE)


def _in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """[…, n] as […, blocks, BLOCK_SIZE], filled up with zeros."""
    padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % BLOCK_SIZE))
    return padded.view(*tensor.shape[:-1], -1 if padded.numel() else _num_blocks(tensor.shape[-1:]), BLOCK_SIZE)
