"""Loads a part of a checkpoint into the model's own class, reading only the tensors of that part."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from petals_lightning.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from petals_lightning.hf.checkpoint import Checkpoint, refusing
from petals_lightning.hf.compat import one_tensor_at_a_time, quiet_transformers, renamed_keys
from petals_lightning.hf.decoder import names_in_decoder
from petals_lightning.hf.pruning import BlockLayout, ModelSlice, find_blocks, num_blocks, prune
from petals_lightning.hf.quantization import bytes_of_block, quantize_linears
from petals_lightning.protocol.quant_types import UNQUANTIZED

logger = logging.getLogger(__name__)


class LoadedPart(NamedTuple):
    """A loaded part of a checkpoint.

    Attributes:
        model: in eval mode and frozen.
        layout: where its blocks are.
        fresh: names of parameters that the checkpoint lacks or has in another shape, which the caller draws.
    """

    model: PreTrainedModel
    layout: BlockLayout
    fresh: frozenset[str]


def load_pruned(
    cls: type[PreTrainedModel],
    checkpoint: Checkpoint,
    part: ModelSlice,
    *,
    dtype: torch.dtype | str = "auto",
    quant_type: str = UNQUANTIZED,
    devices: Sequence[torch.device] = (),
    config_overrides: dict[str, Any] | None = None,
    mixin: type | None = None,
    may_miss: Callable[[str], bool] = lambda key: False,
    on_shard: Callable[[str, int, int], None] | None = None,
) -> LoadedPart:
    """Loads `part` of `checkpoint` as an instance of (a pruned subclass of) `cls`.

    Args:
        cls: the family's own class.
        part: the blocks and ends to keep.
        dtype: of the weights; "auto" is the checkpoint's dtype.
        quant_type: one of `QUANT_TYPES`. Each weight of a block's linears is quantised as soon as it is read.
        devices: where those of each block are kept; on the host if none are given. All else stays there.
        config_overrides: attributes to set on the config, e.g. `num_labels`.
        mixin: a base class placed before `cls` in the subclass.
        may_miss: whether the caller draws a missing parameter (a fresh classification head), by its name.
        on_shard: progress, see `Checkpoint.tensors`.

    Raises:
        ConfigurationError: the padding token has no embedding.
        CheckpointError: tensors of the part are missing or have other shapes than the config says.
    """
    config = copy.deepcopy(checkpoint.decoder_config)
    for name, value in (config_overrides or {}).items():
        setattr(config, name, value)
    check_pad_token(config)
    count = num_blocks(config)
    if not 0 <= part.start <= part.end <= count:
        raise UnsupportedModelError(f"blocks {part.start}:{part.end} of a model that has {count}")
    layouts: list[BlockLayout] = []

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        super(pruned, self).__init__(config, *args, **kwargs)
        layouts.append(layout := prune(self, part))
        if quant_type != UNQUANTIZED:
            for number, block in enumerate(layout.blocks(self)):
                device = devices[number] if devices else torch.device("cpu")
                quantize_linears(block, quant_type, device, layout.model_type)

    bases = (mixin, cls) if mixin is not None else (cls,)
    # Keep the family's own name and module: transformers derives behaviour from them.
    pruned: Any = type(cls.__name__, bases, {"__init__": init, "__module__": cls.__module__})

    with refusing(f"{cls.__name__} cannot be cut into blocks"), torch.device("meta"):
        outline = cls(copy.deepcopy(config))  # only its names are needed, to choose the tensors to read
        outline_layout = prune(outline, part)
    renamed = _names_to_read(cls, checkpoint, outline, outline_layout, part)
    with ExitStack() as stack:
        if quant_type != UNQUANTIZED:
            stack.enter_context(one_tensor_at_a_time())
        lazy = checkpoint.tensors(renamed, stack, on_shard, copied=quant_type != UNQUANTIZED)
        with refusing(f"{cls.__name__} cannot be cut into blocks"), quiet_transformers():
            model, info = pruned.from_pretrained(
                None,
                config=config,
                state_dict={renamed[name]: tensor for name, tensor in lazy.items()},
                dtype=_resolve_dtype(dtype, checkpoint, lazy),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `fresh_parameters` reports them
            )
    fresh = fresh_parameters(cls, checkpoint, info, may_miss)
    _check_unpacked(model, checkpoint)
    model.requires_grad_(False)
    return LoadedPart(model.eval(), layouts[-1], fresh)


def block_bytes(
    cls: type[PreTrainedModel], checkpoint: Checkpoint, dtype: torch.dtype | str, quant_type: str = UNQUANTIZED
) -> list[int]:
    """Bytes of each block's weights, without reading any.

    Args:
        cls: the family's own class.
        quant_type: as of `load_pruned`.
        dtype: as of `load_pruned`; for "auto" of a checkpoint whose config names none, float32, which is the largest.

    Raises:
        UnsupportedModelError: the family cannot be cut into blocks.
    """
    size = _resolve_dtype(dtype, checkpoint, {}).itemsize
    blocks, model_type = outline_blocks(cls, checkpoint)
    return [bytes_of_block(block, size, quant_type, model_type) for block in blocks]


def outline_blocks(cls: type[PreTrainedModel], checkpoint: Checkpoint) -> tuple[list[nn.Module], str]:
    """All blocks of a model without their weights, on the `meta` device, and the decoder's `model_type`.

    Raises:
        UnsupportedModelError: the family cannot be cut into blocks.
    """
    with refusing(f"{cls.__name__} cannot be cut into blocks"), torch.device("meta"), quiet_transformers():
        outline = cls(copy.deepcopy(checkpoint.decoder_config))
        layout = find_blocks(outline)
        return list(layout.blocks(outline)), layout.model_type


def check_pad_token(config: PreTrainedConfig) -> None:
    """Raises ConfigurationError if the padding token has no embedding."""
    text = config.get_text_config()
    pad = getattr(text, "pad_token_id", None)
    if pad is not None and pad >= text.vocab_size:
        raise ConfigurationError(
            f"pad_token_id is {pad}, the model has embeddings for 0…{text.vocab_size - 1}: pad with a token "
            "that the model knows, e.g. the tokenizer's eos_token, and name it as pad_token in tokenizer_config.json"
        )


def _check_unpacked(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError if transformers left weights packed: their backward may lose gradients."""
    for name, tensor in model.named_parameters():
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UnsupportedModelError(
                f"transformers leaves {name} of {checkpoint.name_or_path!r} as {str(tensor.dtype)[6:]}, through which "
                "gradients may be lost: give the checkpoint from which it was made, with --quant-type int8 or nf4"
            )


def fresh_parameters(
    cls: type[PreTrainedModel], checkpoint: Checkpoint, info: dict[str, Any], may_miss: Callable[[str], bool]
) -> frozenset[str]:
    """Names of the parameters that the checkpoint lacks or has in another shape, by transformers' loading `info`.

    Raises:
        CheckpointError: there are some that the caller does not draw (`may_miss`).
    """
    missing, misshapen = set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}
    for kind, keys in (("missing", missing), ("of another shape", misshapen)):
        if wrong := sorted(key for key in keys if not may_miss(key)):
            raise CheckpointError(
                f"checkpoint {checkpoint.name_or_path!r} does not fit {cls.__name__}: {kind}: {', '.join(wrong[:5])}"
                f"{' …' if len(wrong) > 5 else ''}"
            )
    return frozenset(missing | misshapen)


def _resolve_dtype(dtype: torch.dtype | str, checkpoint: Checkpoint, lazy: dict[str, Any]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    declared = checkpoint.decoder_config.dtype
    if declared is not None:
        return getattr(torch, declared) if isinstance(declared, str) else declared
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    for tensor in lazy.values():
        kind = tensor.get_dtype() if hasattr(tensor, "get_dtype") else tensor.dtype
        return names.get(kind, kind if isinstance(kind, torch.dtype) else torch.float32)
    return torch.float32


def _names_to_read(
    cls: type[PreTrainedModel], checkpoint: Checkpoint, model: PreTrainedModel, layout: BlockLayout, part: ModelSlice
) -> dict[str, str]:
    """Maps the checkpoint's names of the tensors of `part` to names from which transformers loads them into `model`.

    Checkpoints have a base model's tensors with or without the prefix (`transformer.h.0…` or `h.0…`), and old ones
    under other names. transformers resolves that itself, so only block numbers change here.

    Args:
        model: instance of `cls` reduced to `part`, without weights.
    """
    prefix = cls.base_model_prefix
    inner = layout.list_path.removeprefix(f"{prefix}.")
    block = re.compile(rf"^((?:{re.escape(prefix)}\.)?{re.escape(inner)}\.)(\d+)(\..*)$")
    kept = model.state_dict()  # a server's decoder may have state outside of its blocks
    wanted, moved = {}, {}
    for name, path in names_in_decoder(cls, checkpoint, model).items():
        if (match := block.match(path)) is None:
            if part.with_embeddings_and_head or path in kept:
                wanted[name] = path
        elif part.start <= (number := int(match[2])) < part.end:
            moved[name] = number - part.start, match[3]
            wanted[name] = f"{match[1]}{number - part.start}{match[3]}"
    if checkpoint.is_wrapper:
        return wanted
    # transformers renames these itself: they keep the checkpoint's names, except for the block number.
    candidates = {name: _lowered(name, part.start) if name in moved and part.start else [name] for name in wanted}
    paths = renamed_keys(model, [candidate for found in candidates.values() for candidate in found])
    for name, found in candidates.items():
        for candidate in found:
            match = block.match(paths[candidate])
            if name not in moved or (match is not None and (int(match[2]), match[3]) == moved[name]):
                wanted[name] = candidate
                break
    return wanted


def _lowered(name: str, by: int) -> list[str]:
    """`name` with one of its numbers lowered by `by`, for each number that allows it."""
    numbers = [match for match in re.finditer(r"(?<![^.])\d+(?![^.])", name) if int(match[0]) >= by]
    return [f"{name[: match.start()]}{int(match[0]) - by}{name[match.end() :]}" for match in numbers]
