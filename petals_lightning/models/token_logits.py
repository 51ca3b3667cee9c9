"""Logits of chosen positions only.

Shapes: B batch, S tokens, N positions that are read, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch

from petals_lightning.client.positions import gather_positions
from petals_lightning.models.thread_hooks import of_this_thread


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

    def only_rows(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (gather_positions(args[0], rows),)

    bridge = getattr(model, "bridge", None)
    hook = model.get_output_embeddings().register_forward_pre_hook(of_this_thread(only_rows))
    try:
        if bridge is not None:
            bridge.rows = rows
        return model(input_ids=input_ids, attention_mask=attention_mask).logits[0]
    finally:
        hook.remove()
        if bridge is not None:
            bridge.rows = None
