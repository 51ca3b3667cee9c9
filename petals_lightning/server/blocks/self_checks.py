"""Tests at load, on random hidden states: whether a family's blocks can be served, and what they allow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.checkpoint import refusing
from petals_lightning.hf.pruning import per_block_lists
from petals_lightning.hf.quantization import dequantized
from petals_lightning.server.blocks.kv_cache import GrowingLayer, SpanCache
from petals_lightning.server.blocks.prefix_cache import shapes_of
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs

_TOKENS, _SAME = 8, 5  # tokens of a sample; tokens that are the same in both samples
_SHORT = 2
_COUNTS = re.compile(r"(^|_)(idx|index|id|number)$")  # attributes that number blocks, such as layer_idx


def telling_blocks(span: BlockSpan) -> tuple[int, int]:
    """The shortest consecutive blocks among which each kind of the span's blocks occurs.

    What holds for these holds for all. In most families that is one block.
    """
    lists = per_block_lists(span.model.config)
    kinds = [_kind(block, [values[index] for values in lists.values()]) for index, block in enumerate(span.blocks)]
    wanted = len(set(kinds))
    for length in range(wanted, len(kinds) + 1):
        for start in range(len(kinds) - length + 1):
            if len(set(kinds[start : start + length])) == wanted:
                return span.start + start, span.start + start + length
    raise AssertionError("the whole span has all its kinds")


def _kind(block: nn.Module, settings: list[Any]) -> str:
    """Equal for blocks that compute the same with other weights.

    Args:
        settings: of the block, from the config's lists.
    """
    parts = []
    for path, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (str, int, float)) and not _COUNTS.search(name)
        }
        shapes = [(name, tuple(weight.shape)) for name, weight in module.named_parameters(recurse=False)]
        parts.append((path, type(module), plain, shapes))
    return repr((parts, settings))


def check_family(span: BlockSpan) -> None:
    """Checks that blocks give the same one by one as in one pass, and read no later positions.

    Families that are refused here would give wrong results silently: blocks that pass each other more than hidden
    states, and bidirectional attention, where padding and the prefix would count.

    Raises:
        UnsupportedModelError: a check fails, or the blocks do not run at all. The message is one line.
    """
    name = f"{type(span.model).__name__} ({span.model.config.model_type})"
    hidden = torch.randn(2, _TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden[1, :_SAME] = hidden[0, :_SAME]
    with refusing(f"{name} cannot be split: its blocks do not run by themselves"):
        graph = span.forward_with_graph(SpanInputs(span.start, span.end, hidden), input_grad=True)
        whole = graph.outputs[0].detach()
        span.backward(graph, torch.ones_like(whole), None)
        with torch.no_grad():
            pieces = hidden
            for number in range(span.start, span.end):
                pieces, _ = span.forward(SpanInputs(number, number + 1, pieces))
            # Doge of transformers 5.10 looks ahead in samples that are shorter than its window, and only there.
            short, _ = span.forward(SpanInputs(span.start, span.end, hidden[:, :_SHORT]))
    if whole.shape != hidden.shape:
        raise UnsupportedModelError(
            f"{name} cannot be split: its blocks make {tuple(whole.shape)} of hidden states {tuple(hidden.shape)}"
        )
    if not _is_same(span, pieces, whole):
        raise UnsupportedModelError(
            f"{name} cannot be split: its blocks give other results one by one than together, so they read more than "
            "the hidden states of the block before them"
        )
    if not (_is_same(span, whole[1, :_SAME], whole[0, :_SAME]) and _is_same(span, short, whole[:, :_SHORT])):
        raise UnsupportedModelError(
            f"{name} is not served: its attention is bidirectional. Positions read later ones, so padding "
            "would change every result"
        )


def check_quantized(span: BlockSpan) -> None:
    """Checks that quantised blocks give the outputs and gradients of plain ones with the same, dequantised weights.

    A kind whose kernels or whose backward lose something would be trained through without an error.

    Raises:
        UnsupportedModelError: they do not. The message is one line.
    """
    start, end = telling_blocks(span)
    hidden = torch.randn(2, _TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))

    def outputs_and_gradients() -> tuple[torch.Tensor, torch.Tensor]:
        graph = span.forward_with_graph(SpanInputs(start, end, hidden), input_grad=True)
        out = graph.outputs[0]
        return out.detach(), span.backward(graph, out.detach().cpu(), None)["hidden"]

    found = outputs_and_gradients()
    with dequantized(span.blocks[start - span.start : end - span.start]):
        expected = outputs_and_gradients()
    for what, *pair in zip(("outputs", "gradients"), found, expected, strict=True):
        if not _is_same(span, *pair):
            raise UnsupportedModelError(
                f"{type(span.model).__name__} ({span.model.config.model_type}) is not served with quant_type "
                f"{span.quant_type} on {span.device}: its {what} are not those of the dequantised weights"
            )


@torch.no_grad()
def verify_sessions(span: BlockSpan) -> bool:
    """Whether positions give the same step by step, after their keys and values, as all at once.

    False for families that keep another state (recurrent, convolutional): they serve training and evaluation only.
    """
    hidden = torch.randn(2, _TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0)).to(span.device)

    start, end = telling_blocks(span)
    layers = [GrowingLayer(_TOKENS) for _ in span.blocks]

    def steps() -> torch.Tensor:
        pieces = hidden.split([_SAME, *[1] * (_TOKENS - _SAME)], dim=1)
        cache = SpanCache(layers, start - span.start)
        return torch.cat([span.step(start, end, piece, cache) for piece in pieces], dim=1)

    same = same_outputs(span, steps, lambda: span.forward(SpanInputs(start, end, hidden))[0])
    return same and all(layer.get_seq_length() == _TOKENS for layer in layers[start - span.start : end - span.start])


def same_outputs(span: BlockSpan, *ways: Callable[[], torch.Tensor]) -> bool:
    """Whether two ways to run a span give the same up to rounding; False if the family's code refuses one."""
    try:
        outputs = [run().float() for run in ways]
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError, ValueError):
        return False
    return _is_same(span, *outputs)


def _is_same(span: BlockSpan, found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.float(), expected.float()
    tolerance = 1e-4 if span.dtype == torch.float32 else 5e-2
    return found.shape == expected.shape and bool((found - expected).norm() / expected.norm() < tolerance)


def verify_shared_prefix(span: BlockSpan) -> bool:
    """Whether running the prefix once gives the same as the concatenated batch.

    False for families with unusual attention, such as a state that samples change. For these the server runs the
    concatenated batch; clients see no difference.
    """
    return _changes_nothing(span, "share_prefix")


def verify_skipping(span: BlockSpan) -> bool:
    """Whether the positions that are read have the same outputs if the last block skips the others.

    False for families whose last block keeps no keys and values; it then runs on all positions.
    """
    return all(_changes_nothing(span, "skips_unread", [2, 5, 14], has_prefix) for has_prefix in (True, False))


@torch.no_grad()
def measure_past_shapes(span: BlockSpan) -> dict[int, tuple[int, int, int]]:
    """Heads, size of a key and size of a value that each block keeps of a position.

    Args:
        span: one that has sessions and may share a prefix.
    """
    hidden = torch.zeros(1, span.hidden_size, device=span.device, dtype=span.dtype)
    cache = span.run_prefix(SpanInputs(span.start, span.end, hidden[None], hidden), {}).cache
    return dict(zip(range(span.start, span.end), shapes_of(cache.past(span.start)), strict=True))


@torch.no_grad()
def _changes_nothing(span: BlockSpan, option: str, rows: list[int] | None = None, has_prefix: bool = True) -> bool:
    """Whether a span's outputs are the same with and without an option; `rows` index three samples of five tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, span.hidden_size, generator=generator)
    prefix = torch.randn(3, span.hidden_size, generator=generator) if has_prefix else None
    read = torch.tensor(rows) if rows is not None else None
    inputs, chosen = SpanInputs(*telling_blocks(span), hidden, prefix, rows=read), getattr(span, option)

    def outputs(value: bool) -> torch.Tensor:
        setattr(span, option, value)
        return span.forward(inputs)[0]

    try:
        return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
    finally:
        setattr(span, option, chosen)
