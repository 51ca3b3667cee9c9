"""Hugging Face decoders without code per family: cut a model's own class around its blocks, read only what is kept."""

from petals_lightning.hf.checkpoint import Checkpoint
from petals_lightning.hf.context_limits import RotaryLimit, rotary_limit, sliding_window
from petals_lightning.hf.loading import block_bytes, load_pruned
from petals_lightning.hf.pruning import BlockLayout, ModelSlice, find_blocks

__all__ = [
    "BlockLayout",
    "Checkpoint",
    "ModelSlice",
    "RotaryLimit",
    "block_bytes",
    "find_blocks",
    "load_pruned",
    "rotary_limit",
    "sliding_window",
]
