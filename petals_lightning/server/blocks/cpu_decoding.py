"""How a CPU decodes: how the weights of linear layers lie, who multiplies a single position with them, and threads.

A decoded token reads all weights for one position, so it takes as long as that reading. All rules below are fixed and
not trials, so that a server started again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_FEW = 4  # positions, whose products one thread reads weights for as fast as two
_SHORT = 1 << 19  # positions held × hidden size: below that, waking threads for attention takes longer than they save


class DecodingLinear(nn.Linear):
    """A linear layer without gradients for its weight [N, K], which lies column by column.

    One position is multiplied by NumPy's BLAS (OpenBLAS, in the wheels that everybody has): 0.75 to 0.94 × the time of
    PyTorch's (MKL, on an EPYC; layers of 512² to 4096² weights, one thread each: more did not help PyTorch). All else
    is PyTorch's, which is as good there and has gradients.

    Attributes:
        columns: [K, N], the weight's own memory: so it must stay where it is.
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
    """Stores float32 weights of `nn.Linear` on a CPU column by column. Values, shapes and names stay as they are.

    That takes single positions 0.7 × the time of row by row (PyTorch 2.13, EPYC, hidden 512 × 8 blocks, one thread and
    two); forward and backward of 64 positions and more took 0.95–1.04 ×. In bfloat16 there was no difference, and GPUs
    have kernels for both.
    """
    for layer in (module for module in model.modules() if type(module) is nn.Linear):
        if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)
            layer.__class__ = DecodingLinear
            layer.columns = layer.weight.detach().t().numpy()  # type: ignore[assignment]


@contextmanager
def threads_for(hidden: torch.Tensor, length: int) -> Iterator[None]:
    """One thread for a step of few float32 positions on a CPU, where a second one is woken more often than it helps.

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
