"""Passes of a model that read chosen positions only.

Shapes: B batch, S tokens, N positions that are read, V vocabulary, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from petals_lightning.client.positions import gather_positions, scatter_positions


@contextmanager
def reading(model: Any, head: Any, positions: torch.Tensor, *, shape: tuple[int, int] | None = None) -> Iterator[None]:
    """Limits this thread's passes to some positions: servers return no others, and the head runs on no others.

    Args:
        model: local or distributed.
        head: the module of `model` that computes logits.
        positions: [N] indices into B·S.
        shape: B and S, to get the head's outputs as [B, S, V] with zeros elsewhere; None: as [1, N, V].
    """
    owner = threading.get_ident()  # other threads may run the same model

    def gather(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (gather_positions(args[0], positions),) if threading.get_ident() == owner else None

    def scatter(head: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if shape is None or threading.get_ident() != owner:
            return None
        return scatter_positions(output, positions, *shape)

    bridge = getattr(model, "bridge", None)
    hooks = [head.register_forward_pre_hook(gather), head.register_forward_hook(scatter)]
    try:
        if bridge is not None:
            bridge.rows = positions
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if bridge is not None:
            bridge.rows = None


def token_logits(
    model: Any, input_ids: torch.Tensor, rows: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [N, V] of a causal language model, local or distributed, at some positions of a batch.

    Only these positions' hidden states are fetched from servers, and only their logits are computed. A family's changes
    to logits (scaling, soft caps) apply. Gradients are those of the full computation.

    Args:
        input_ids: [B, S].
        rows: [N] indices into the B·S positions.
        attention_mask: [B, S], 0 on the right where there is padding.
    """
    with reading(model, model.get_output_embeddings(), rows):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits[0]
