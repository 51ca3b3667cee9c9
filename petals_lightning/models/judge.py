"""Computes blocks on this machine, to decide where servers disagree."""

from __future__ import annotations

import torch
from transformers import AutoModel

from petals_lightning.client.segments import Segment
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.quantization import check_can_quantize
from petals_lightning.protocol.adapters import Adapter, float_zeros
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs


class LocalJudge:
    """Computes a segment on this machine in float32, one block after another, so that one at a time is in memory.

    Args:
        checkpoint: the model. It is never downloaded for this.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __call__(
        self,
        segment: Segment,
        adapter: Adapter | None,
        grads: tuple[torch.Tensor, torch.Tensor | None] | None,
        quant_type: str = UNQUANTIZED,
    ) -> dict[str, torch.Tensor]:
        """Computes what a server should answer.

        Args:
            segment: the blocks and their inputs.
            adapter: of the blocks, or None.
            grads: gradients of the outputs: hidden's, and [P, H] the prefix's or None. None asks for a forward.
            quant_type: how the server keeps its weights.

        Returns:
            hidden [B, S, H] or [N, H] and prefix [P, H] of a forward; or gradients of hidden, prefix and the
            adapter's tensors.

        Raises:
            CheckpointError: the blocks are not on this machine's disk.
            UnsupportedModelError: their family cannot run here.
            ConfigurationError: bitsandbytes is missing for this `quant_type`.
        """
        check_can_quantize(quant_type)
        hidden, prefix, steps = segment.hidden, segment.prefix, []
        for block in range(segment.start, segment.end):
            own = adapter.between(block, block + 1) if adapter is not None else None
            is_last = block == segment.end - 1
            steps.append(SpanInputs(block, block + 1, hidden, prefix, own, segment.rows if is_last else None))
            if not is_last or grads is None:
                with torch.no_grad():
                    hidden, prefix = self._load(block, quant_type).forward(steps[-1])
        if grads is None:
            return _given(hidden=hidden, prefix=prefix)
        grad, grad_prefix = grads
        adapter_grads = float_zeros(adapter) if adapter is not None else None
        for step in reversed(steps):
            span = self._load(step.start, quant_type)
            graph = span.forward_with_graph(step, input_grad=True)
            result = span.backward(graph, grad.float(), grad_prefix.float() if grad_prefix is not None else None)
            grad, grad_prefix = result["hidden"], result.get("prefix")
            if adapter_grads is not None:
                adapter_grads.between(step.start, step.end).copy_(result)
        return _given(hidden=grad, prefix=grad_prefix) | (adapter_grads.tensors() if adapter_grads is not None else {})

    def _load(self, block: int, quant_type: str) -> BlockSpan:
        checkpoint = self._checkpoint.on_disk()
        with torch.random.fork_rng(devices=[]):  # loading must not advance training's random generator
            model, layout, _ = load_pruned(
                model_class(AutoModel, checkpoint),
                checkpoint,
                ModelSlice(block, block + 1, with_embeddings_and_head=False),
                dtype=torch.float32,
                quant_type=quant_type,
            )
        span = BlockSpan(model, layout, block)
        span.share_prefix = span.skips_unread = False  # no shortcuts, whatever the family allows
        return span


def _given(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
