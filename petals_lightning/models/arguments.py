"""Keyword arguments of `from_pretrained`. Unknown ones are refused: a misspelt `initial_peers` must not be ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from petals_lightning.errors import ConfigurationError

_NOT_HERE = {
    "trust_remote_code": "code that comes with a checkpoint is never run, here or on servers",
    "device_map": "the local part of the model is loaded on the CPU; move it by model.to(device)",
    "attn_implementation": "attention runs on the servers, each of which chooses its own implementation",
    "quantization_config": "blocks are on the servers; only embeddings, norm and head are held here",
    "load_in_8bit": "blocks are on the servers; only embeddings, norm and head are held here",
    "load_in_4bit": "blocks are on the servers; only embeddings, norm and head are held here",
    "config": "the checkpoint's own config is used; change single values by their names, e.g. num_labels=3",
    "state_dict": "weights are read from the checkpoint",
    "adapter_kwargs": "an adapter is given by adapter=FOLDER or a hub id",
}
"""Arguments of Hugging Face's `from_pretrained` that have no meaning here, and why."""

_OF_EVERY_MODEL = {"num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Values that any config may have: some families' configs lack the tokens that they do not use (CodeGen)."""


def config_overrides(config: PreTrainedConfig, given: Mapping[str, Any], arguments: Iterable[str]) -> dict[str, Any]:
    """The keywords of `given` that set values of a model's config.

    Args:
        config: the model's config.
        given: keywords that `from_pretrained` does not name itself.
        arguments: the names of its own arguments, for suggestions.

    Raises:
        ConfigurationError: a keyword cannot be set.
    """
    own = {name for name in dir(config) if not name.startswith("_") and not callable(getattr(type(config), name, None))}
    settable = own | _OF_EVERY_MODEL
    overrides = {}
    for name, value in given.items():
        if name in _NOT_HERE:
            if value not in (None, False):
                raise ConfigurationError(f"{name}={value!r} does not go together with remote blocks: {_NOT_HERE[name]}")
        elif name not in settable:
            near = difflib.get_close_matches(name, {*arguments, *settable}, n=1)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(
                f"from_pretrained has no argument {name!r}, and {type(config).__name__} has no such value{advice}"
            )
        else:
            overrides[name] = value
    return overrides
