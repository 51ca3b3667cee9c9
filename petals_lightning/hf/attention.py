"""The reach of a model's attention."""

from __future__ import annotations

from transformers import PreTrainedConfig


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The shortest reach of attention in any block, in positions, padding counted; None if all are unlimited.

    Families call it `sliding_window`, `window_size`, `attention_window_size`, …; the shortest one counts.
    """
    text = config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) == {"full_attention"}:
        return None
    lengths = [value for name, value in vars(text).items() if type(value) is int and value > 0 and _is_window(name)]
    return min(lengths, default=None)


def _is_window(name: str) -> bool:
    if name in ("attention_chunk_size", "local_attention"):
        return True
    return "window" in name and not any(other in name for other in ("layer", "pattern"))
