"""Conversions between our requests and the arguments of Petals' methods: pure, and exact in both directions.

Petals has no prefix, so the prefix becomes part of every sample. Petals returns all positions, and prompts' gradients
for every sample.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, n blocks of the leg, N positions that are read.
"""

from __future__ import annotations

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest
from petals_lightning.protocol.steps import StepRequest


def with_prefix(hidden: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """[B, S, H] with [P, H] before every sample: [B, P + S, H]."""
    if prefix is None:
        return hidden
    return torch.cat([prefix.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)


def prompts_of(request: ForwardRequest | StepRequest) -> torch.Tensor | None:
    """[n, 1, P, H]: servers add it to every sample."""
    adapter = request.adapter
    return adapter.deep[:, None] if adapter is not None and adapter.deep is not None else None


def active_name(request: ForwardRequest | StepRequest) -> str | None:
    """Name of the adapter that acts beside the client's own, and that the server holds; None without one."""
    adapter = request.adapter
    return adapter.active.name if adapter is not None and adapter.active is not None else None


def output_of(request: ForwardRequest, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """`hidden` [B, S, H] or [N, H], and `prefix` [P, H] if wanted, of the [B, P + S, H] of a server's answer."""
    length = _prefix_length(request)
    hidden = out[:, length:]
    if request.rows is not None:
        hidden = hidden.reshape(-1, hidden.shape[2])[request.rows.long()]
    answer = {"hidden": hidden}
    if request.want_prefix and length:
        answer["prefix"] = out[0, :length]  # the same in every sample, so any sample will do
    return answer


def output_grad(request: BackwardRequest, forward: ForwardRequest) -> torch.Tensor:
    """The gradient [B, P + S, H] of a server's answer to `forward`: 0 where `output_of` reads nothing."""
    batch, tokens, size = forward.hidden.shape
    length = _prefix_length(forward)
    grad = request.grad
    if forward.rows is not None:
        if grad.shape != (len(forward.rows), size):
            raise ProtocolError(f"gradients {list(grad.shape)} of {len(forward.rows)} rows")
        grad = grad.new_zeros(batch * tokens, size).index_add(0, forward.rows.long(), grad).view(batch, tokens, size)
    grad = torch.nn.functional.pad(grad, (0, 0, length, 0))
    if request.grad_prefix is not None:
        grad[0, :length] = request.grad_prefix.to(grad.dtype)  # `output_of` reads it there
    return grad


def input_grads(
    forward: ForwardRequest, grad: torch.Tensor, grad_prompts: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Gradients `hidden`, `prefix` and `deep`, summed over the samples that share them, from a server's answer.

    Args:
        grad: [B, P + S, H].
        grad_prompts: [n, B, P, H], if the forward had deep prompts.
    """
    length = _prefix_length(forward)
    grads = {"hidden": grad[:, length:]} if forward.input_grad else {}
    if length:
        grads["prefix"] = grad[:, :length].sum(0, dtype=torch.float32)
    if grad_prompts is not None:
        grads["deep"] = grad_prompts.sum(1, dtype=torch.float32)
    return grads


def _prefix_length(request: ForwardRequest) -> int:
    return len(request.prefix) if request.prefix is not None else 0
