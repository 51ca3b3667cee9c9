"""Keys and values that a client gives in place of a prefix: on the wire, in the blocks, and refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.adapters import Adapter, PastKeyValues, by_block, float_zeros
from petals_lightning.server.blocks.self_checks import measure_past_shapes
from petals_lightning.server.blocks.span import SpanInputs
from tests.helpers.families import ALL, HIDDEN, NUM_BLOCKS
from tests.helpers.spans import B, P, S, assert_same, inputs, run

SHAPES = ((2, 8, 8), (1, 16, 4))
"""Of blocks by turns."""


def past(blocks: range = range(NUM_BLOCKS), heads: int = 2, size: int = 8, length: int = P) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(len(blocks), heads, length, size, generator=draw) for _ in range(2))
    return Adapter(blocks.start, blocks.stop, past=(PastKeyValues(tuple(blocks), keys, values),))


def test_keys_and_values_of_several_shapes_survive_the_wire():
    of_block = {
        block: (torch.randn(heads, P, key), torch.randn(heads, P, value))
        for block, (heads, key, value) in zip(range(1, 5), SHAPES * 2, strict=True)
    }
    adapter = Adapter(1, 5, past=PastKeyValues.grouped(of_block))
    assert [part.blocks for part in adapter.past] == [(2, 4), (1, 3)]
    key, received = Adapter.from_message(adapter.to_message(7))
    assert key == 7
    assert received.is_same(adapter)
    assert not received.is_same(adapter.map(lambda tensor: tensor + 1))
    assert not adapter.lora_only.tensors()
    for found, expected in zip(by_block(received.past), of_block.values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    grads, part = float_zeros(adapter), adapter.between(2, 4)
    assert [each.blocks for each in part.past] == [(2,), (3,)]
    grads.between(2, 4).copy_(part.tensors())
    assert [keys.norm() > 0 for keys, _ in by_block(grads.past)] == [False, True, True, False]


@pytest.mark.parametrize("rows", [None, [2, 6, 17]], ids=["all positions", "one a sample"])
def test_keys_and_values_of_a_prefix_do_what_it_does(rows, load_span):
    span = load_span("llama")
    span.past_shapes = measure_past_shapes(span)
    given = inputs(*ALL, deep=False, rows=rows)
    with torch.no_grad():
        named = span.prefix_past(given)
    template = float_zeros(past())
    template.copy_(named)
    own = replace(given, prefix=None, adapter=template)
    span.check_adapter(template)
    by_keys, by_prefix = run(span, own), run(span, given)
    shared = {name: by_prefix[name] for name in ("out", "grad of hidden")}
    assert_same({name: by_keys[name] for name in shared}, shared)
    span.skips_unread = False
    assert_same(by_keys, run(span, own))


WRONG = {
    "another number of heads": (
        past(heads=4),
        r"of block 0 have heads and sizes \(4, 8, 8\), here they are \(2, 8, 8\)",
    ),
    "another size": (past(size=16), r"of block 0 have heads and sizes \(2, 16, 16\)"),
    "no position": (past(length=0), r"do not fit 4 blocks"),
    "some blocks only": (replace(past(range(1, 4)), start=0), r"are for blocks \[1, 2, 3\], must be for 0:4"),
    "a block twice": (
        Adapter(*ALL, past=(*past(range(3)).past, *past(range(2, 4)).past)),
        r"are for blocks \[0, 1, 2, 2, 3\]",
    ),
    "two lengths": (Adapter(*ALL, past=(*past(range(2)).past, *past(range(2, 4), length=1).past)), "for one P"),
    "deep prompts too": (replace(past(), deep=torch.randn(NUM_BLOCKS, P, HIDDEN)), "not both"),
}


@pytest.mark.parametrize(("adapter", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_in_words(adapter, words, load_span):
    span = load_span("llama")
    span.past_shapes = measure_past_shapes(span)
    with pytest.raises(ProtocolError, match=words):
        span.check_adapter(Adapter.from_message(adapter.to_message(1))[1])


def test_a_family_that_keeps_more_takes_none(load_span):
    span = load_span("llama")  # as if its tests at load had found so
    with pytest.raises(ProtocolError, match=r"LlamaModel \(llama\) keeps more than keys and values"):
        span.check_adapter(past())
    with pytest.raises(ProtocolError, match="keeps more than keys and values"):
        span.prefix_past(SpanInputs(*ALL, torch.randn(B, S, HIDDEN), torch.randn(P, HIDDEN)))


def test_a_prefix_is_not_given_twice():
    with pytest.raises(ProtocolError, match="a prefix is given twice"):
        past().check_fits(*ALL, torch.randn(P, HIDDEN))
