"""The arithmetic of a span: the prefix that runs once gives what the concatenated batch gives, in every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.server.blocks.graphs import measure_graph_cost
from petals_lightning.server.blocks.prefix_cache import PrefixLayer, TakingLayer
from petals_lightning.server.blocks.self_checks import verify_shared_prefix, verify_skipping
from petals_lightning.server.blocks.span import SpanInputs
from tests.helpers.families import HIDDEN, NUM_BLOCKS, TINY_CONFIGS
from tests.helpers.spans import B, P, S, assert_same, finish, inputs, run

FAMILIES = ["llama", "bloom", "falcon_alibi", "gemma2", "mixtral", "gpt2"]


@pytest.mark.parametrize("deep", [True, False], ids=["deep_ptune", "ptune"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_equals_a_concatenated_one(family, deep, load_span):
    span = load_span(family)
    assert verify_shared_prefix(span)
    assert span.share_prefix
    given = inputs(0, NUM_BLOCKS, deep=deep)
    shared = run(span, given)
    span.share_prefix = False
    assert_same(shared, run(span, given))


@pytest.mark.parametrize("deep", [True, False], ids=["deep_ptune", "ptune"])
def test_micro_batches_that_share_one_run_of_the_prefix_equal_those_that_do_not(deep, load_span, monkeypatch):
    span, runs = load_span("llama"), []
    run_prefix = span.run_prefix
    monkeypatch.setattr(span, "run_prefix", lambda *args: runs.append(args) or run_prefix(*args))
    whole = inputs(0, NUM_BLOCKS, deep=deep)
    parts = [replace(whole, hidden=whole.hidden[first : first + 1]) for first in range(B)]
    expected = [run(span, part) for part in parts]
    assert len(runs) == B
    graphs = [span.forward_with_graph(parts[0], input_grad=True)]
    for part in parts[1:]:
        graphs.append(span.forward_with_graph(part, input_grad=True, prefix_run=graphs[0].prefix_run))
    assert len(runs) == B + 1
    for part, graph, alone in zip(parts, graphs, expected, strict=True):
        assert_same(finish(span, part, graph), alone)
    for changed in (whole.prefix + 1, whole.prefix.bfloat16(), whole.prefix[:-1]):
        adapter = Adapter(0, NUM_BLOCKS, whole.adapter.deep[:, : len(changed)]) if deep else None
        other = replace(parts[1], prefix=changed, adapter=adapter)
        graph = span.forward_with_graph(other, input_grad=True, prefix_run=graphs[0].prefix_run)
        assert_same(finish(span, other, graph), run(span, other))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "concatenated"])
def test_rows_are_the_same_positions_of_the_whole(share, load_span):
    span = load_span("llama")
    span.share_prefix = share
    rows = [17, 0, 8]
    whole, _ = span.forward(inputs(0, NUM_BLOCKS))
    some, _ = span.forward(inputs(0, NUM_BLOCKS, rows=rows))
    torch.testing.assert_close(some, whole.reshape(B * S, HIDDEN)[rows])
    graph = span.forward_with_graph(inputs(0, NUM_BLOCKS, rows=rows), input_grad=True)
    few = span.backward(graph, torch.ones(3, HIDDEN), None)
    grad = torch.zeros(B * S, HIDDEN)
    grad[rows] = 1
    graph = span.forward_with_graph(inputs(0, NUM_BLOCKS), input_grad=True)
    assert_same(few, span.backward(graph, grad.view(B, S, HIDDEN), None))


@pytest.mark.parametrize("start", [0, NUM_BLOCKS - 1], ids=["whole", "one block"])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_last_block_that_skips_what_is_not_read_equals_a_full_pass(family, start, load_span):
    span = load_span(family)
    assert verify_skipping(span)
    assert span.skips_unread
    positions, given = [], inputs(start, NUM_BLOCKS, rows=[2, 6, 17])
    span.blocks[-1].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    skipping = run(span, given)
    # The prefix, the keys of all tokens, and what is read; windows of these tiny models are shorter than P + S.
    assert positions == ([P, S] if span._window else [P, S, 1])
    span.skips_unread = False
    assert_same(skipping, run(span, given))


@pytest.mark.parametrize("rows", [[2, 6], [2, 6, 7], [2, 17, 6], [2, 6, 12, 17]], ids=str)
def test_other_reads_take_a_full_pass(rows, load_span):
    span, given = load_span("llama"), inputs(0, NUM_BLOCKS, rows=rows)
    positions = []
    span.blocks[-1].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    out, _ = span.forward(given)
    assert positions == [P, S]
    whole, _ = span.forward(inputs(0, NUM_BLOCKS))
    torch.testing.assert_close(out, whole.reshape(B * S, HIDDEN)[rows])


@pytest.mark.parametrize("window", [P + S, P + S - 1])
def test_the_last_block_skips_within_the_attention_window_only(window, load_span):
    span, given = load_span("gemma2"), inputs(0, NUM_BLOCKS, rows=[2, 6, 17])
    positions = []
    span.blocks[-1].register_forward_pre_hook(lambda _, args: positions.append(args[0].shape[1]))
    span._window = window
    span.forward(given)
    assert positions == ([P, S, 1] if window == P + S else [P, S])


def test_a_family_whose_last_block_keeps_no_keys_takes_a_full_pass(load_span, monkeypatch):
    span = load_span("llama")
    monkeypatch.setattr(TakingLayer, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    assert not verify_skipping(span)
    monkeypatch.undo()
    taken, changed = TakingLayer.update, []

    def update(self, *args, **kwargs):
        keys, values = taken(self, *args, **kwargs)
        changed.append(keys)
        return 2 * keys, values

    monkeypatch.setattr(TakingLayer, "update", update)
    assert not verify_skipping(span)  # wrong numbers
    assert changed


@pytest.mark.parametrize("share", [True, False], ids=["shared", "concatenated"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_a_sub_span_equals_a_server_of_these_blocks_alone(family, share, load_span):
    whole, alone = load_span(family), load_span(family, 1, 3)
    whole.share_prefix = alone.share_prefix = share
    given = inputs(1, 3)
    assert_same(run(whole, given), run(alone, given))
    assert_same(run(whole, inputs(0, 4)), run(load_span(family), inputs(0, 4)))  # the sub-span left no trace


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_spans_in_a_chain_equal_one(family, load_span):
    first, second, whole = load_span(family, 0, 1), load_span(family, 1, 4), load_span(family)
    given = inputs(0, 4)
    hidden, prefix = first.forward(SpanInputs(0, 1, given.hidden, given.prefix, given.adapter.between(0, 1)))
    hidden, prefix = second.forward(SpanInputs(1, 4, hidden, prefix, given.adapter.between(1, 4)))
    expected, expected_prefix = whole.forward(given)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prefix, expected_prefix, rtol=1e-5, atol=1e-5)


def test_without_prompts_samples_do_not_see_each_other(load_span):
    span, given = load_span("llama"), inputs(0, 4, prefix=False, deep=False)
    out, prefix = span.forward(given)
    assert prefix is None
    for sample in range(B):
        alone, _ = span.forward(SpanInputs(0, 4, given.hidden[sample : sample + 1]))
        torch.testing.assert_close(alone[0], out[sample], rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none(load_span):
    span = load_span("llama")
    graph = span.forward_with_graph(inputs(0, 4, deep=False), input_grad=False)
    assert set(span.backward(graph, torch.ones(B, S, HIDDEN), None)) == {"prefix"}
    graph = span.forward_with_graph(inputs(0, 4, prefix=False, deep=False), input_grad=False)
    assert span.backward(graph, torch.ones(B, S, HIDDEN), None) == {}


def test_a_prefix_that_is_all_that_counts_has_its_gradient(load_span):
    """`hidden` has no part in the loss, as in a micro-batch whose rows nobody reads."""
    span = load_span("llama")
    graph = span.forward_with_graph(inputs(0, 4), input_grad=True)
    grads = span.backward(graph, torch.zeros(B, S, HIDDEN), torch.ones(P, HIDDEN))
    assert grads["hidden"].norm() == 0
    assert grads["prefix"].norm() > 0


def test_a_family_with_another_attention_falls_back_to_the_concatenated_prefix(load_span, monkeypatch):
    span, given = load_span("llama"), inputs(0, 4)
    expected = run(span, given)
    monkeypatch.setattr(PrefixLayer, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    assert not verify_shared_prefix(span)  # wrong numbers
    monkeypatch.setattr(PrefixLayer, "update", lambda self, keys: None)
    assert not verify_shared_prefix(span)  # a family whose code takes no such cache
    span.share_prefix = False
    assert_same(run(span, given), expected)


def test_weights_never_change_and_take_no_gradient(load_span):
    span = load_span("llama")
    before = {name: parameter.clone() for name, parameter in span.model.named_parameters()}
    run(span, inputs(0, 4))
    for name, parameter in span.model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(("family", "tokens"), [("llama", 32), ("llama", 200), ("bloom", 32), ("bloom", 200)])
def test_the_measured_graph_is_about_what_autograd_saves(family, tokens, load_span):
    span = load_span(family)
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = 8
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        graph = span.forward_with_graph(SpanInputs(0, 4, torch.randn(batch, tokens, HIDDEN)), input_grad=True)
    for parameter in span.model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    assert graph.outputs
    estimate = measure_graph_cost(span).num_bytes(blocks=NUM_BLOCKS, batch=batch, queries=tokens, keys=tokens)
    assert estimate > HIDDEN * 4 * batch * tokens * NUM_BLOCKS  # at the very least, every block saves its input
    assert estimate == pytest.approx(sum(saved.values()), rel=0.25)
