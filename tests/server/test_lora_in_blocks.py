"""LoRA on a server: only in the pass of the request that names it, and only if it fits the blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.adapters import Adapter, LoraFactors, float_zeros
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.graphs import measure_graph_cost
from petals_lightning.server.blocks.held_adapters import HeldAdapters
from petals_lightning.server.blocks.span import SpanInputs
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.sessions.batched_decoding import DecodeStep
from petals_lightning.server.sessions.session_cache import SessionCache
from tests.helpers.families import ALL, HIDDEN, NUM_BLOCKS
from tests.helpers.spans import P, assert_same, inputs, run

QUERY, DOWN = "self_attn.q_proj", "mlp.down_proj"


def lora(target: str = QUERY, rank: int = 2, blocks: tuple[int, ...] = tuple(range(NUM_BLOCKS)), seed: int = 0):
    draw, size = torch.Generator().manual_seed(seed), 48 if target == DOWN else HIDDEN
    a = torch.randn(len(blocks), rank, size, generator=draw)
    return LoraFactors(target, blocks, a, 0.1 * torch.randn(len(blocks), HIDDEN, rank, generator=draw))


def adapted(given: SpanInputs, *factors: LoraFactors) -> SpanInputs:
    deep = given.adapter.deep if given.adapter is not None else None
    return replace(given, adapter=Adapter(given.start, given.end, deep, factors))


def test_an_adapter_survives_the_wire():
    adapter = Adapter(1, 4, torch.randn(3, P, HIDDEN), (lora(blocks=(1, 3)), lora(DOWN, blocks=(2,))))
    key, received = Adapter.from_message(adapter.to_message(5))
    assert key == 5
    assert received.is_same(adapter)
    assert not received.is_same(adapter.map(lambda tensor: tensor + 1))
    assert not received.is_same(adapter.lora_only)
    part = adapter.between(2, 4)
    assert [factors.blocks for factors in part.lora] == [(3,), (2,)]
    assert torch.equal(part.tensors()["lora.0.b"], adapter.lora[0].b[1:])
    grads = float_zeros(adapter)
    grads.between(2, 4).copy_(part.tensors())
    assert torch.equal(grads.lora[0].a[1], adapter.lora[0].a[1])
    assert grads.lora[0].a[0].norm() == 0


WRONG = {
    "an unknown target": (
        lora("self_attn.x_proj"),
        r"block 0 has no linear 'self_attn.x_proj'; its linears are self_att",
    ),
    "another width": (
        replace(lora(), a=torch.randn(4, 2, 7)),
        r"inputs and outputs \(7, 32\), in block 0 .* \(32, 32\)",
    ),
    "a rank of 0": (lora(rank=0), "rank 0, must be 1 to 32"),
    "a rank above the matrix": (lora(rank=33), "rank 33, must be 1 to 32"),
    "a block that is not served": (lora(blocks=(3, 4)), "for blocks .3, 4., must be some of 0:4"),
    "blocks in another order": (lora(blocks=(1, 0)), "must be some of 0:4 in order"),
    "fewer blocks than factors": (replace(lora(), blocks=(0, 1)), "do not fit 2 blocks"),
    "factors of two ranks": (replace(lora(), b=torch.randn(4, HIDDEN, 3)), "do not fit 4 blocks"),
}


@pytest.mark.parametrize(("factors", "words"), WRONG.values(), ids=WRONG)
def test_lora_that_does_not_fit_is_refused_in_words(factors, words, load_span):
    message = Adapter(0, NUM_BLOCKS, None, (factors,)).to_message(1)
    with pytest.raises(ProtocolError, match=words):
        load_span("llama").check_adapter(Adapter.from_message(message)[1])


def test_an_adapter_of_other_blocks_than_the_request_is_refused():
    with pytest.raises(ProtocolError, match="adapter of blocks 0:2 does not fit blocks 0:4"):
        Adapter(0, 2, None, (lora(blocks=(0, 1)),)).check_fits(0, 4, None)


@pytest.mark.parametrize("rows", [None, [2, 6, 17]], ids=["all positions", "one a sample"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_shared_prefix_gives_the_gradients_of_a_concatenated_one(family, prefix, rows, load_span):
    span = load_span(family)
    names = {"llama": (QUERY, DOWN), "gpt2": ("attn.c_proj", "attn.c_proj")}[family]
    given = adapted(inputs(*ALL, prefix=prefix, deep=prefix, rows=rows), lora(names[0]), lora(names[1], 3, (1, 3), 1))
    shared = run(span, given)
    span.share_prefix = span.skips_unread = False
    assert_same(shared, run(span, given))


def test_no_other_pass_meets_the_lora_of_a_request(load_span, monkeypatch):
    span, plain = load_span("llama"), inputs(*ALL)
    one, other = adapted(plain, lora()), adapted(plain, lora(DOWN, 3, seed=1), lora("self_attn.o_proj", 1))
    with torch.no_grad():
        expected = [load_span("llama").forward(each)[0] for each in (plain, one, other)]
        assert (expected[0] - expected[1]).norm() > 0.1
        for number in (1, 0, 2, 0, 1, 2):
            assert torch.equal(span.forward((plain, one, other)[number])[0], expected[number])
        with monkeypatch.context() as patch:
            patch.setattr(span.blocks[2].mlp, "forward", lambda x: x[:, :0] @ x)
            with pytest.raises(RuntimeError):
                span.forward(one)
        assert torch.equal(span.forward(plain)[0], expected[0])
    assert not any(module._forward_hooks for block in span.blocks for module in block.modules() if module is not block)


def opened(span, adapter: Adapter | None, length: int) -> tuple[SessionCache, torch.Tensor]:
    """A session of `length` positions, and the hidden states of these and the next one."""
    hidden = torch.randn(1, length + 1, HIDDEN, generator=torch.Generator().manual_seed(length))
    opening = StepRequest(0, *ALL, hidden[:, :length], 0, max_length=length + 1, adapter=adapter)
    cache = SessionCache(span, opening, num_bytes=0)
    cache.step(span, opening)
    return cache, hidden


def test_steps_of_sessions_have_their_own_lora_and_join_those_with_the_same(load_span):
    span = load_span("llama")
    adapters = [Adapter(*ALL, None, (lora(),)), Adapter(*ALL, None, (lora(DOWN, 3),)), None]
    steps: list[list[DecodeStep]] = []
    for adapter in adapters:
        pair = []
        for length in (5, 8):
            cache, hidden = opened(span, adapter, length)
            step = DecodeStep(span, cache, StepRequest(0, *ALL, hidden[:, length:], length))
            expected, _ = span.forward(SpanInputs(*ALL, hidden, adapter=adapter))
            assert (step()["hidden"] - expected[:, -1:]).norm() < 1e-4 * expected[:, -1:].norm()
            pair.append(step)
        steps.append(pair)
    for pair in steps:
        alone = [step()["hidden"] for step in pair]
        assert pair[1].can_batch([pair[0]])
        together = [out["hidden"] for out in pair[0].run_batch([pair[1]])]
        for got, wanted in zip(together, alone, strict=True):
            assert (got - wanted).norm() < 1e-4 * wanted.norm()
    assert not steps[1][1].can_batch([steps[0][0]])
    assert not steps[2][1].can_batch([steps[0][0]])


def test_clients_with_one_held_adapter_share_batches(load_span):
    span = load_span("llama")
    held = HeldAdapters([Adapter(*ALL, lora=(lora(),), name="polite", fingerprint="x")])
    resources = ServerResources(span, ComputeThread(), ServerLimits(), {}, adapters=held)
    named = Adapter(*ALL, active=Adapter(*ALL, name="polite"))
    registered = [resources.with_held(Adapter.from_message(named.to_message(key))[1]) for key in (1, 2)]
    assert registered[0] is registered[1] is resources.petals_adapter(*ALL, None, "polite")
    assert registered[0].num_bytes == 0, "it is no client's"
    steps = []
    for adapter, length in zip(registered, (5, 8), strict=True):
        cache, hidden = opened(span, adapter, length)
        steps.append(DecodeStep(span, cache, StepRequest(0, *ALL, hidden[:, length:], length)))
        expected, _ = span.forward(SpanInputs(*ALL, hidden, adapter=Adapter(*ALL, lora=(lora(),))))
        assert (steps[-1]()["hidden"] - expected[:, -1:]).norm() < 1e-4 * expected[:, -1:].norm()
    assert steps[1].can_batch([steps[0]])
    beside = resources.with_held(Adapter(*ALL, lora=(lora(DOWN),), active=Adapter(*ALL, name="polite")))
    assert [factors.target for factors in beside.all_lora] == [QUERY, DOWN]
    assert beside.num_bytes == sum(tensor.nbytes for tensor in beside.tensors().values())
    with pytest.raises(Refusal, match="no adapter 'rude' is held here; there are polite"):
        resources.with_held(Adapter(*ALL, active=Adapter(*ALL, name="rude")))


def test_an_active_adapter_is_sent_by_name_or_with_its_tensors():
    active = Adapter(*ALL, lora=(lora(blocks=(1, 3)),), name="polite", fingerprint="x")
    adapter = Adapter(*ALL, torch.randn(4, P, HIDDEN), active=active)
    part: Any = adapter.between(2, 4)
    received: Any
    assert part.active.lora[0].blocks == (3,)
    assert adapter.between(2, 3).active is None
    for held in ({}, {"polite": "y"}, {"rude": "x"}):
        _, received = Adapter.from_message(part.as_sent(held).to_message(1))
        assert received.active.name is None
        assert torch.equal(received.active.lora[0].a, active.lora[0].a[1:])
        assert received.num_bytes == part.deep.nbytes + part.active.num_bytes
        assert received.tensors().keys() == {"deep"}, "only these have gradients"
    _, received = Adapter.from_message(part.as_sent({"polite": "x"}).to_message(1))
    assert (received.active.name, received.active.lora) == ("polite", ())
    with pytest.raises(ProtocolError, match="it does not hold the adapter 'polite'"):
        Adapter(*ALL, active=Adapter(*ALL, name="polite")).as_sent({"rude": "x"})


def test_the_estimate_of_a_graph_includes_lora(load_span):
    span = load_span("llama")
    given = adapted(SpanInputs(*ALL, torch.randn(8, 32, HIDDEN)), lora(), lora(DOWN, 4))
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        graph = span.forward_with_graph(given, input_grad=True)
    for tensor in (*span.model.parameters(), *graph.leaves.values()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    plain = measure_graph_cost(span).num_bytes(blocks=NUM_BLOCKS, batch=8, queries=32, keys=32)
    own = 8 * 32 * NUM_BLOCKS * 4 * (HIDDEN + 2 + 48 + 4)
    assert plain < 1.05 * sum(saved.values())
    assert plain + own > 0.95 * sum(saved.values())
