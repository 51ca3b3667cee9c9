"""Loads a model's tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from petals_lightning.errors import CheckpointError


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, token: str | bool | None = None, **hub: Any
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, which pads on the right. If it has no pad token, it pads with eos, or else unk.

    Args:
        name_or_path: hub id or folder.
        revision, token, hub: as in transformers.

    Raises:
        CheckpointError: there is no tokenizer at `name_or_path`, or none of its tokens can pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, token=token, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"tokenizer={name_or_path}: no tokenizer there ({reason}); it must be a hub id or a folder with a "
            "config.json and a tokenizer"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer of {name_or_path!r} has no pad, eos or unk token to pad with")
    return tokenizer
