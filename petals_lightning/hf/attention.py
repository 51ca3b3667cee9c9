"""How far back a model's attention reaches."""

from __future__ import annotations

from transformers import PreTrainedConfig


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Positions that attention reaches back in some block, padding counted; None if it reaches to the first in all."""
    text = config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) == {"full_attention"}:
        return None
    return getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
