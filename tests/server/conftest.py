"""Spans without a server around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModel

from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.server.blocks.span import BlockSpan
from tests.helpers.families import NUM_BLOCKS


@pytest.fixture(scope="module")
def load_span(tiny_checkpoint) -> Callable[..., BlockSpan]:
    """`load_span("llama", 1, 4)` holds blocks 1:4 of the family's tiny model; a checkpoint's folder is taken too."""

    def load(model: str | Path, start: int = 0, end: int = NUM_BLOCKS) -> BlockSpan:
        checkpoint = Checkpoint(str(tiny_checkpoint(model) if isinstance(model, str) else model))
        pruned, layout, _ = load_pruned(
            model_class(AutoModel, checkpoint),
            checkpoint,
            ModelSlice(start, end, with_embeddings_and_head=False),
            dtype="float32",
        )
        return BlockSpan(pruned, layout, start)

    return load


@pytest.fixture(scope="module")
def span(load_span: Callable[..., BlockSpan]) -> BlockSpan:
    """Blocks 1:3 of a tiny Llama."""
    return load_span("llama", 1, 3)
