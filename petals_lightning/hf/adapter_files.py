"""LoRA in PEFT's format, as files.

adapter_config.json         settings, with the names of `peft.LoraConfig`
adapter_model.safetensors   the factors, and maybe a classification head, by their paths in the whole model
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from petals_lightning.errors import CheckpointError
from petals_lightning.hf.checkpoint import find_saved
from petals_lightning.hf.compat import is_bypassed
from petals_lightning.hf.lora import HEADS, LoraConfig
from petals_lightning.hf.pruning import BlockLayout
from petals_lightning.protocol.adapters import Adapter, LoraFactors

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_FINGERPRINT_BYTES = 8


def adapter_name(source: str | Path) -> str:
    """The name under which servers announce an adapter: its hub id, or the last part of its folder's path."""
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


def read_config(source: str | Path, **hub: Any) -> dict[str, Any]:
    """The config of an adapter in a folder or a hub repository. Raises CheckpointError if there is none."""
    path = find_adapter_file(source, CONFIG, **hub)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"{path} is not the config of an adapter: {e}") from e
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} is not the config of an adapter")
    return said


def read_settings(source: str | Path, **hub: Any) -> LoraConfig:
    """The settings of an adapter.

    Dropout acts in training only. So an adapter that was trained with it is the same here, and is trained on without.

    Raises:
        CheckpointError: there is no adapter.
        ConfigurationError: a setting is not supported here.
    """
    said = read_config(source, **hub)
    if said.get("lora_dropout"):
        logger.info("adapter %s was trained with lora_dropout=%s; here there is none", source, said["lora_dropout"])
    return LoraConfig.of(said | {"init_lora_weights": True, "lora_dropout": 0.0})  # its values are read, not drawn


def read_adapter(source: str | Path, layout: BlockLayout, count: int, start: int, end: int, **hub: Any) -> Adapter:
    """An adapter of blocks [start, end), named by `adapter_name`, in float32 with B scaled.

    A classification head is left out: it is outside of the blocks.

    Args:
        source: folder or hub id.
        layout: of the model, whole or pruned.
        count: the whole model's number of blocks.
        start, end: the blocks to read.
        hub: as in transformers.

    Raises:
        CheckpointError: there is no adapter, or it is for another model.
        ConfigurationError: a setting is not supported here.
    """
    scale, path = read_settings(source, **hub).scale, find_adapter_file(source, WEIGHTS, **hub)
    in_blocks = re.compile(rf"(?:.*\.)?{re.escape(layout.list_path)}\.(\d+)\.(.+)\.lora_([AB])\.weight")
    found: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            match = in_blocks.fullmatch(name)
            if match is None:
                if name.removeprefix(PREFIX).partition(".")[0] in HEADS:
                    continue
                raise CheckpointError(f"adapter {str(source)!r} has, besides LoRA of the blocks, {name}")
            block, target, letter = int(match[1]), match[2], match[3]
            if block >= count:
                raise CheckpointError(f"adapter {str(source)!r} is for block {block}, the model has {count}")
            if is_bypassed(layout.model_type, target):
                raise CheckpointError(
                    f"adapter {str(source)!r} is for {target}, whose weight this family's kernels read without the "
                    "module"
                )
            if start <= block < end:
                pair = found.setdefault((target, block), {})
                if letter in pair:
                    raise CheckpointError(f"adapter {str(source)!r} has two factors {letter} for {target} of {block}")
                pair[letter] = file.get_tensor(name).float()
    groups: dict[Any, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for (target, block), pair in sorted(found.items(), key=lambda item: item[0][1]):
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"adapter {str(source)!r} lacks a factor for {target} of block {block}")
        groups.setdefault((target, pair["A"].shape, pair["B"].shape), []).append((block, pair["A"], pair["B"] * scale))
    lora = tuple(
        LoraFactors(target, tuple(blocks), torch.stack(a), torch.stack(b))
        for (target, *_), group in groups.items()
        for blocks, a, b in [zip(*group, strict=True)]
    )
    return Adapter(start, end, lora=lora, name=adapter_name(source), fingerprint=_fingerprint(source, path, **hub))


def adapter_bytes(source: str | Path, **hub: Any) -> int:
    """Bytes of an adapter's factors in its file. Raises as `read_settings`."""
    read_settings(source, **hub)
    return find_adapter_file(source, WEIGHTS, **hub).stat().st_size


def find_adapter_file(source: str | Path, name: str, **hub: Any) -> Path:
    """A file of an adapter. Raises CheckpointError if it is not there."""
    return find_saved(source, name, what="adapter", writers="save_pretrained or PEFT", **hub)


def _fingerprint(source: str | Path, weights: Path, **hub: Any) -> str:
    """A short digest of an adapter's files."""
    digest = hashlib.blake2b(digest_size=_FINGERPRINT_BYTES)
    for path in (find_adapter_file(source, CONFIG, **hub), weights):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as e:
        raise CheckpointError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e
