"""Faster decoding on CPUs: memory order of weights, multiplication of single positions, number of threads.

Decoding a token reads all weights for one position, and takes as long as that reading. The rules below are fixed and
not measured at start, so that a restarted server gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_FEW = 4  # positions, up to which one thread reads weights as fast as two
_SHORT = 1 << 19  # positions held × hidden size: below it, waking threads for attention takes longer than they save


class DecodingLinear(nn.Linear):
    """A linear layer with a frozen weight [N, K], stored column by column.

    NumPy's BLAS (OpenBLAS, in NumPy's wheels) multiplies a single position: 0.75 to 0.94 × the time of PyTorch's (MKL,
    on an EPYC; layers of 512² to 4096² weights, one thread each: more did not help PyTorch). PyTorch multiplies
    everything else: it is as fast there, and has gradients.

    Attributes:
        columns: [K, N], a view of the weight's memory, so the weight must not move.
    """

    columns: np.ndarray

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, K] to […, N]."""
        is_single = input.numel() == self.in_features and input.dtype == torch.float32
        if not is_single or input.requires_grad or torch.is_grad_enabled():
            return super().forward(input)
        out = torch.from_numpy(input.numpy() @ self.columns)
        return out if self.bias is None else out + self.bias


def order_weights_for_decoding(model: nn.Module) -> None:
    """Stores float32 weights of `nn.Linear` on a CPU column by column. Values, shapes and names do not change.

    Single positions then take 0.7 × the time of row by row (PyTorch 2.13, EPYC, hidden 512 × 8 blocks, one thread and
    two); forward and backward of 64 positions and more take 0.95–1.04 ×. bfloat16 shows no difference, and GPUs have
    kernels for both orders.
    """
    for layer in (module for module in model.modules() if type(module) is nn.Linear):
        if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
            layer.__class__ = DecodingLinear
            layer.columns = layer.weight.detach().t().numpy()  # type: ignore[assignment]


@contextmanager
def threads_for(hidden: torch.Tensor, length: int) -> Iterator[None]:
    """Runs a step of few float32 positions with one CPU thread: waking a second one costs more than it saves.

    Args:
        hidden: [B, n, H] of the step.
        length: positions held before these, which attention reads.
    """
    threads, (batch, tokens, size) = torch.get_num_threads(), hidden.shape
    is_short = batch * tokens <= _FEW and batch * length * size < _SHORT
    if threads == 1 or not is_short or hidden.device.type != "cpu" or hidden.dtype != torch.float32:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
