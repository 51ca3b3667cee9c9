"""What blocks give on this machine: decides where servers disagree."""

from __future__ import annotations

import torch
from transformers import AutoModel

from petals_lightning.client.segments import Segment
from petals_lightning.hf import Checkpoint, Part, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs


class LocalJudge:
    """Computes a segment here, in float32: one block after another, so that one is in memory at a time.

    Args:
        checkpoint: the model. Nothing is downloaded for this.
    """

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __call__(
        self, segment: Segment, deep: torch.Tensor | None, grads: tuple[torch.Tensor, torch.Tensor | None] | None
    ) -> dict[str, torch.Tensor]:
        """What a server should answer.

        Args:
            segment: blocks and what enters them.
            deep: [n, P, H] prompts of its blocks, or None.
            grads: of the outputs: hidden's, and [P, H] the prefix's or None. None asks for a forward.

        Returns:
            hidden [B, S, H] or [N, H] and prefix [P, H] of a forward; or gradients of hidden, prefix and deep.

        Raises:
            CheckpointError: the blocks are not on this machine.
            UnsupportedModelError: their family does not run here.
        """
        hidden, prefix, steps = segment.hidden, segment.prefix, []
        for block in range(segment.start, segment.end):
            own = deep[block - segment.start : block - segment.start + 1] if deep is not None else None
            is_last = block == segment.end - 1
            steps.append(SpanInputs(block, block + 1, hidden, prefix, own, segment.rows if is_last else None))
            if not is_last or grads is None:
                with torch.no_grad():
                    hidden, prefix = self._load(block).forward(steps[-1])
        if grads is None:
            return _given(hidden=hidden, prefix=prefix)
        grad, grad_prefix = grads
        deep_grads: list[torch.Tensor] = []
        for step in reversed(steps):
            span = self._load(step.start)
            graph = span.forward_with_graph(step, input_grad=True)
            found = span.backward(graph, grad.float(), grad_prefix.float() if grad_prefix is not None else None)
            grad, grad_prefix = found["hidden"], found.get("prefix")
            if deep is not None:
                deep_grads.insert(0, found["deep"])
        return _given(hidden=grad, prefix=grad_prefix, deep=torch.cat(deep_grads) if deep_grads else None)

    def _load(self, block: int) -> BlockSpan:
        checkpoint = self._checkpoint.on_disk()
        with torch.random.fork_rng(devices=[]):  # loading must not move the generator that training draws from
            model, layout, _ = load_pruned(
                model_class(AutoModel, checkpoint),
                checkpoint,
                Part(block, block + 1, ends=False),
                dtype=torch.float32,
            )
        span = BlockSpan(model, layout, block)
        span.share_prefix = span.skips_unread = False  # the plain way, whatever the family allows
        return span


def _given(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
