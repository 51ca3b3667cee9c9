"""Cuts a decoder's own Hugging Face class around its blocks.

A decoder is an *owner* (`LlamaModel`, `OPTDecoder`, …) that embeds tokens, runs a ModuleList of blocks and normalises
the result. A server keeps only some blocks, a client keeps everything else; both run the family's own code for the rest
(masks, rotary embeddings, sliding windows, ALiBi).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.compat import GradientCheckpointingLayer
from petals_lightning.hf.linears import linear_shape


@dataclass(frozen=True)
class BlockLayout:
    """The place of a model's blocks, e.g. owner `model`, list `layers`; owner `""` is the model itself.

    Attributes:
        max_positions: positions in its tables, learned (GPT-2, OPT) or precomputed (GPT-J); None: unlimited.
        attributes: plain values that blocks have as attributes, which some decoders read (Nemotron-H).
        linears: inputs and outputs of each linear module of the whole model, by path, in the order of `named_modules`.
        experts: paths of modules that hold the weights of several experts as one tensor.
        model_type: of the config.
    """

    owner_path: str
    list_name: str
    max_positions: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    model_type: str = ""

    @property
    def list_path(self) -> str:
        return f"{self.owner_path}.{self.list_name}" if self.owner_path else self.list_name

    def owner(self, model: nn.Module) -> Any:
        return model.get_submodule(self.owner_path)

    def blocks(self, model: nn.Module) -> Any:
        return model.get_submodule(self.list_path)

    def set_blocks(self, model: nn.Module, blocks: nn.Module) -> None:
        setattr(self.owner(model), self.list_name, blocks)


@dataclass(frozen=True)
class ModelSlice:
    """The part of a model to keep: blocks [start, end) and, if wanted, embeddings, norm and head."""

    start: int
    end: int
    with_embeddings_and_head: bool


def num_blocks(config: PreTrainedConfig) -> int:
    """The number of transformer blocks in a config's text model."""
    return config.get_text_config().num_hidden_layers


def find_blocks(model: PreTrainedModel) -> BlockLayout:
    """Finds the ModuleList of `num_hidden_layers` blocks.

    Raises:
        UnsupportedModelError: there is no such list or more than one (encoder-decoders, multi-tower models), or the
            blocks read more than the previous block's hidden states.
    """
    name, count = f"{type(model).__name__} ({model.config.model_type})", num_blocks(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: only decoders are served (Llama, BLOOM, Falcon, Mixtral, …)"
        )
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _holds_blocks(module)
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(found)} lists of {count} blocks, not one: it is not a plain decoder of the kind that can "
            "be split (Llama, BLOOM, Falcon, Mixtral, Mistral, Qwen, GPT-2, …)"
        )
    owner_path, _, list_name = found[0].rpartition(".")
    plain = {
        name: value
        for name, value in vars(model.get_submodule(f"{found[0]}.0")).items()
        if isinstance(value, (str, int, float)) and not name.startswith("_")
    }
    linears = {path: shape for path, each in model.named_modules() if (shape := linear_shape(each)) is not None}
    layout = BlockLayout(
        owner_path, list_name, _max_positions(model), plain, linears, _experts_in(model), model.config.model_type
    )
    if (reason := _why_not_split(model, layout)) is not None:
        raise UnsupportedModelError(f"{name} cannot be split into blocks on servers: {reason}")
    return layout


def _experts_in(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        path
        for path, module in model.named_modules()
        if not isinstance(module, nn.Conv1d) and any(weight.ndim == 3 for weight in module.parameters(recurse=False))
    )


def _why_not_split(model: PreTrainedModel, layout: BlockLayout) -> str | None:
    """What blocks read besides the previous block's hidden states, as far as that shows without running them."""
    owner, text = layout.owner(model), model.config.get_text_config()
    blocks_take = {name for block in layout.blocks(model) for name in inspect.signature(block.forward).parameters}
    if not isinstance(owner, PreTrainedModel):
        return f"{type(owner).__name__}, which runs them, embeds no tokens, as in encoders like BERT"
    if getattr(text, "hidden_size_per_layer_input", None) and any("per_layer_input" in name for name in blocks_take):
        return "every block reads embeddings of the tokens (per-layer inputs)"
    if getattr(text, "num_kv_shared_layers", None):
        return f"its last {text.num_kv_shared_layers} blocks read the keys and values of blocks before them"
    return None


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of tokens with an embedding."""
    return next(model.get_input_embeddings().parameters()).shape[0]


def _max_positions(model: PreTrainedModel) -> int | None:
    """The number of positions in a whole model's tables. A few more rows than that are offsets (OPT has two)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    embeddings = (m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    tables = [*embeddings, *(buffer for buffer in model.buffers() if buffer.ndim > 1)]
    return limit if limit and any(limit <= table.shape[-2] <= limit + 2 for table in tables) else None


def norms_of(owner: nn.Module, hidden_size: int) -> list[nn.Module]:
    """The decoder's own modules whose parameters are only scales and shifts of a position's features."""
    return [
        child
        for child in owner.children()
        if not list(child.children())
        and (parameters := list(child.parameters()))
        and all(parameter.shape == (hidden_size,) for parameter in parameters)
    ]


def _holds_blocks(modules: nn.ModuleList) -> bool:
    return all(isinstance(module, GradientCheckpointingLayer) for module in modules) or all(
        "Block" in type(module).__name__ or "Layer" in type(module).__name__ for module in modules
    )


def prune(model: PreTrainedModel, part: ModelSlice) -> BlockLayout:
    """Reduces `model` to `part`, in place. For models on the meta device, before weights are loaded."""
    layout = find_blocks(model)
    owner, blocks = layout.owner(model), list(layout.blocks(model))
    kept = blocks[part.start : part.end]
    numbers = _numbers_of_blocks(blocks, part)
    layout.set_blocks(model, nn.ModuleList(kept))
    for module, name in numbers:
        setattr(module, name, getattr(module, name) - part.start)
    if not part.with_embeddings_and_head:
        embedding = model.get_input_embeddings()
        for parent in _ancestors(model, layout.owner_path):
            for name, child in list(parent.named_children()):
                holds_blocks = child is owner or any(module is owner for module in child.modules())
                if name == layout.list_name or holds_blocks or not any(True for _ in child.parameters()):
                    continue
                setattr(parent, name, _substitute(child, embedding))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config = sliced_config(module.config, part.start, part.end)
    return layout


def place_blocks(model: PreTrainedModel, layout: BlockLayout, devices: Sequence[torch.device]) -> None:
    """Moves each block of a pruned model to its device, and the rest of the model to that of the first block."""
    blocks = layout.blocks(model)
    for block, device in zip(blocks, devices, strict=True):
        block.to(device)
    layout.set_blocks(model, nn.ModuleList())
    model.to(devices[0])  # type: ignore[arg-type]
    layout.set_blocks(model, blocks)


def _numbers_of_blocks(blocks: Sequence[nn.Module], part: ModelSlice) -> list[tuple[nn.Module, str]]:
    """Modules in blocks of `part`, and the attributes with their block's number.

    Families call it `layer_idx`, `layer_id`, …. Such an attribute is recognised by holding the block's number in every
    block that has it.
    """
    found: dict[str, list[tuple[int, int, nn.Module]]] = {}
    for number, block in enumerate(blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    found.setdefault(name, []).append((number, value, module))
    numbers = {
        name: uses
        for name, uses in found.items()
        if all(number == value for number, value, _ in uses) and len({number for number, _, _ in uses}) > 1
    }
    return [
        (module, name)
        for name, uses in numbers.items()
        for number, _, module in uses
        if part.start <= number < part.end
    ]


def sliced_config(config: PreTrainedConfig, start: int, end: int) -> PreTrainedConfig:
    """A copy of `config` for blocks [start, end) only: their number, and lists with one entry per block."""
    config = copy.deepcopy(config)
    text_config, lists = config.get_text_config(), per_block_lists(config)
    cls, given = type(text_config), vars(text_config).keys() & lists.keys()
    text_config.num_hidden_layers = end - start
    for name in given:
        setattr(text_config, name, lists[name][start:end])
    # The others are computed from a period or block numbers, which would count from the first kept block.
    if computed := lists.keys() - given:
        members = {name: _constant(lists[name][start:end]) for name in computed}
        text_config.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **members})
    return config


def per_block_lists(config: PreTrainedConfig) -> dict[str, Sequence[Any]]:
    """The lists of a config with one entry per block, by name; also those that it computes."""
    text_config, count = config.get_text_config(), num_blocks(config)
    cls = type(text_config)
    names = [*vars(text_config), *(name for name in dir(cls) if isinstance(getattr(cls, name), property))]
    return {name: value for name in names if _is_per_block(value := getattr(text_config, name, None), count)}


def _constant(value: Any) -> property:
    return property(lambda self: value)


def _is_per_block(value: Any, count: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple)) and len(value) == count


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    yield model
    for part in path.split(".") if path else ():
        model = getattr(model, part)
        yield model


def _substitute(child: nn.Module, input_embedding: nn.Module | None) -> nn.Module:
    if child is input_embedding:
        return _NoTokens()
    if isinstance(child, nn.Embedding):
        return _ZeroEmbedding()
    return _Passage()


class _NoTokens(nn.Module):
    """A stand-in for the token embedding, which a server does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("a span of blocks takes hidden states, not tokens")


class _Passage(nn.Module):
    """A stand-in for modules that a server skips, such as the last norm; returns its hidden states unchanged."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = (*args, *kwargs.values())
        return next(value for value in given if isinstance(value, torch.Tensor) and value.is_floating_point())


class _ZeroEmbedding(nn.Module):
    """A stand-in for learned position embeddings, which the client has already added."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())
