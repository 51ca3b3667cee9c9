"""Inputs of a span of blocks, and what it makes of them: outputs and all gradients."""

from __future__ import annotations

import torch

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.server.blocks.span import BlockSpan, SpanGraph, SpanInputs
from tests.helpers.families import HIDDEN

B, S, P = 3, 6, 4
"""Samples, tokens of each, virtual tokens."""


def inputs(start: int, end: int, *, prefix: bool = True, deep: bool = True, rows: list[int] | None = None):
    draw = torch.Generator().manual_seed(0)
    return SpanInputs(
        start,
        end,
        torch.randn(B, S, HIDDEN, generator=draw),
        torch.randn(P, HIDDEN, generator=draw) if prefix else None,
        Adapter(start, end, torch.randn(end - start, P, HIDDEN, generator=draw)) if deep else None,
        torch.tensor(rows) if rows is not None else None,
    )


def run(span: BlockSpan, given: SpanInputs) -> dict[str, torch.Tensor]:
    """Outputs and the gradients of a fixed loss on them."""
    return finish(span, given, span.forward_with_graph(given, input_grad=True))


def finish(span: BlockSpan, given: SpanInputs, graph: SpanGraph) -> dict[str, torch.Tensor]:
    out = graph.outputs[0].detach()
    weights = [torch.linspace(-1, 1, t.numel()).cos().view_as(t) for t in graph.outputs]
    grads = span.backward(graph, weights[0], weights[1] if given.prefix is not None else None)
    found = {"out": out, **{f"grad of {name}": grad for name, grad in grads.items()}}
    if given.prefix is not None:
        found["prefix out"] = graph.outputs[1].detach()
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert value.norm() > 1e-6, f"the test is blind: {name} is zero"
        assert ((got[name] - value).norm() / value.norm()).item() < 1e-5, name
