"""What callers of `generate` need to know of a model: how tokens are chosen, where texts end, how long they may be."""

from __future__ import annotations

from typing import Any

from petals_lightning.models.trainable import prompts_of


def sampling_options(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of `generate`. Temperature 0 is greedy. `top_k` is that of the model's generation config."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def end_ids(model: Any) -> list[int]:
    """The tokens that end a text, as the model's generation config names them."""
    named = model.generation_config.eos_token_id
    return list(named) if isinstance(named, list) else [named] if named is not None else []


def longest_text(model: Any) -> int:
    """Tokens of a text and its continuation, at most: the model's positions, without those of its virtual tokens.

    2048 where the config names none.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    prompts = prompts_of(model)
    return int(positions - (prompts.pre_seq_len if prompts is not None else 0))
