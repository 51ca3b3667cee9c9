"""Steps of several sessions as one batch: each gets what it would get alone, and nobody pays for another's failure."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.blocks.kv_cache import StackedLayer
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import ComputeThread, Priority
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.sessions import batched_decoding
from petals_lightning.server.sessions.batched_decoding import DecodeStep, verify_batched_decoding
from petals_lightning.server.sessions.session_cache import CacheStore, SessionCache
from tests.helpers.families import HIDDEN, NUM_BLOCKS, TINY_CONFIGS, longrope_config, save_tiny_checkpoint
from tests.helpers.sessions import random_prompts
from tools.testing.tensors import relative_error


class Talk:
    """A session and the steps that its client will take.

    Args:
        length: positions that it opens with.
        padding: how many of them are padding, in the first sample.
        prompted: whether prompts stand in front.
        reorders: whether samples change places at every step.
        goes_back: whether each step begins one position before where the last one ended.
    """

    def __init__(self, span, length, *, batch=1, padding=0, prompted=False, reorders=False, goes_back=False, steps=4):
        self.span, self.batch, self.steps = span, batch, steps
        self._reorders, self._goes_back, self._position = reorders, goes_back, 0
        self._mask = torch.ones(batch, length, dtype=torch.bool)
        self._mask[0, :padding] = False
        self.is_padded, self._draw = padding > 0, torch.Generator().manual_seed(length)
        torch.manual_seed(length)
        prompts = random_prompts(span.end - span.start) if prompted else {}
        opening = self.request(length, max_length=length + steps, **prompts)
        self.cache = SessionCache(span, opening, 0)
        DecodeStep(span, self.cache, opening)()

    def request(self, tokens: int = 1, **fields) -> StepRequest:
        """The client's next step."""
        if self._position:
            self._position -= self._goes_back
            self._mask = torch.nn.functional.pad(self._mask[:, : self._position], (0, tokens), value=True)
        hidden = torch.randn(self.batch, tokens, HIDDEN, generator=self._draw)
        if self._reorders and self._position:
            fields["hypo_ids"] = torch.arange(self.batch).flip(0)
        if self.is_padded:
            ids = (self._mask.cumsum(1) - 1).clamp(min=0)
            fields |= {"attention_mask": self._mask, "position_ids": ids[:, -tokens:]}
        request = StepRequest(0, self.span.start, self.span.end, hidden, self._position, **fields)
        self._position += tokens
        return request

    def step(self, **fields) -> DecodeStep:
        return DecodeStep(self.span, self.cache, replace(self.request(), **fields))


def talks(span: BlockSpan) -> list[Talk]:
    """Sessions of every kind and length that can join."""
    return [
        Talk(span, 12, prompted=True),
        Talk(span, 7),
        Talk(span, 9, batch=2, padding=3),
        Talk(span, 10, batch=3, reorders=True),
        Talk(span, 3, goes_back=True),
        Talk(span, 4, batch=2, padding=1, prompted=True, reorders=True),
    ]


def alone(span: BlockSpan, steps: int) -> list[list[torch.Tensor]]:
    """Outputs of each step of each, run one by one."""
    every = talks(span)
    return [[talk.step()()["hidden"] for talk in every] for _ in range(steps)]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def joined(steps: list[DecodeStep]) -> list[DecodeStep]:
    chosen: list[DecodeStep] = []
    for step in steps:
        if step.can_batch(chosen):
            chosen.append(step)
    return chosen


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of tiny models are so small that sharing them is worth no copy."""
    monkeypatch.setattr(BlockSpan, "weight_bytes", lambda span, start, end: 10**9)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_sessions_of_all_kinds_and_lengths_get_together_what_each_gets_alone(family, load_span):
    span = load_span(family)
    assert verify_batched_decoding(span)
    expected, together = alone(span, 4), talks(span)
    for wanted in expected:
        first, *others = steps = [talk.step() for talk in together]
        assert joined(steps) == steps
        assert_same([out["hidden"] for out in first.run_batch(others)], wanted)


@pytest.mark.usefixtures("roomy")
def test_sessions_of_a_slice_of_blocks_join(load_span):
    span = load_span("gemma2")
    opened = []
    for length in (3, 6):
        hidden = torch.randn(1, length + 1, HIDDEN)
        pair = []
        for _ in range(2):
            opening = StepRequest(0, 1, 3, hidden[:, :length], 0, max_length=length + 1)
            cache = SessionCache(span, opening, 0)
            DecodeStep(span, cache, opening)()
            pair.append(DecodeStep(span, cache, StepRequest(0, 1, 3, hidden[:, length:], length)))
        opened.append(pair)
    (one, one_alone), (other, other_alone) = opened
    assert other.can_batch([one])
    got = [out["hidden"] for out in one.run_batch([other])]
    assert_same(got, [one_alone()["hidden"], other_alone()["hidden"]])


@pytest.mark.usefixtures("roomy")
def test_steps_that_are_of_another_kind_do_not_join(load_span):
    span = load_span("llama")
    talk, other = Talk(span, 5), Talk(span, 8, batch=2)
    step = other.step()
    assert talk.step().can_batch([step])
    again = other.step(position=8)
    assert again.can_batch([])
    assert not again.can_batch([step]), "the same session"
    deep = Adapter(0, NUM_BLOCKS, torch.zeros(NUM_BLOCKS, 1, HIDDEN))
    assert not talk.step(adapter=deep).can_batch([step])
    assert not talk.step(hidden=torch.ones(1, 2, HIDDEN)).can_batch([step]), "more positions"
    assert not talk.step(position=50).can_batch([step]), "positions are lost"
    large = Talk(span, 2, batch=31)
    assert not large.step().can_batch([step]), "too many positions"
    opening = StepRequest(0, 0, 4, torch.ones(1, 1, HIDDEN), 0, max_length=1)
    assert not DecodeStep(span, SessionCache(span, opening, 0), opening).can_batch([step])
    span.batches_sessions = False
    assert not talk.step().can_batch([])
    span.batches_sessions = True


def test_a_copy_that_takes_longer_than_reading_the_weights_is_not_made(load_span, monkeypatch):
    span = load_span("llama")
    short, long = Talk(span, 2), Talk(span, 40)
    position_bytes = short.cache.position_bytes
    assert position_bytes == 2 * 2 * 8 * 4 * NUM_BLOCKS, "keys and values of 2 heads of 8, in float32"
    for weights, joins in ((3 * 2 * 41 - 41 - 3 + 1, True), (3 * 2 * 41 - 41 - 3 - 1, False)):
        monkeypatch.setattr(span, "weight_bytes", lambda start, end, weights=weights: weights * position_bytes)
        assert short.step(position=2).can_batch([long.step(position=40)]) is joins


@pytest.mark.usefixtures("roomy")
def test_sessions_on_both_sides_of_a_rotary_limit_do_not_join(load_span, tmp_path):
    span = load_span(save_tiny_checkpoint(longrope_config(16), tmp_path))
    below, beyond, further = (Talk(span, length) for length in (5, 17, 25))
    twins = [Talk(span, length) for length in (17, 25)]
    step = beyond.step()
    assert not below.step().can_batch([step])
    other = further.step()
    assert other.can_batch([step])
    assert_same([out["hidden"] for out in step.run_batch([other])], [talk.step()()["hidden"] for talk in twins])


def test_a_family_that_cannot_be_stacked_is_found_out(load_span, monkeypatch):
    span = load_span("llama")
    honest = StackedLayer.update
    monkeypatch.setattr(StackedLayer, "update", lambda *args, **kwargs: [t.flip(2) for t in honest(*args, **kwargs)])
    assert not verify_batched_decoding(span)  # wrong numbers
    monkeypatch.setattr(StackedLayer, "update", lambda self, keys: None)
    assert not verify_batched_decoding(span)  # a family whose code takes no such cache


def run_as_one(steps: list[DecodeStep]) -> list[Any]:
    """What steps that wait for the thread at the same moment give: outputs or errors."""

    async def main() -> list[Any]:
        compute, go_on, begun = ComputeThread().start(), threading.Event(), threading.Event()
        holder = asyncio.create_task(compute.run(Priority.DECODE, lambda: (begun.set(), go_on.wait())))
        await asyncio.to_thread(begun.wait)
        tasks = [
            asyncio.create_task(compute.run(Priority.DECODE, step, client=str(number)))
            for number, step in enumerate(steps)
        ]
        await asyncio.sleep(0)
        go_on.set()
        await holder
        done = await asyncio.gather(*tasks, return_exceptions=True)
        compute.stop()
        return [one if isinstance(one, BaseException) else one.value["hidden"] for one in done]

    return asyncio.run(main())


def count_batches(span: BlockSpan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the span will have run."""
    sizes, honest = [], span.step

    def step(start, end, hidden, *args, **kwargs):
        sizes.append(len(hidden))
        return honest(start, end, hidden, *args, **kwargs)

    monkeypatch.setattr(span, "step", step)
    return sizes


@pytest.mark.usefixtures("roomy")
def test_what_waits_for_the_thread_runs_as_one_batch(load_span, monkeypatch):
    span = load_span("llama")
    [expected], together = alone(span, 1), talks(span)
    batches = count_batches(span, monkeypatch)
    assert_same(run_as_one([talk.step() for talk in together]), expected)
    assert batches == [10]


@pytest.mark.usefixtures("roomy")
def test_a_batch_that_fails_is_run_one_by_one(load_span, monkeypatch):
    span = load_span("llama")
    expected, together = alone(span, 2), talks(span)
    honest = span.layout.blocks(span.model)[2].forward
    with monkeypatch.context() as patch:

        def forward(hidden, *args, **kwargs):
            if len(hidden) == 10:  # the batch of all: two blocks have taken in its keys by now
                raise RuntimeError("no")
            return honest(hidden, *args, **kwargs)

        patch.setattr(span.layout.blocks(span.model)[2], "forward", forward)
        assert_same(run_as_one([talk.step() for talk in together]), expected[0])
    assert_same(run_as_one([talk.step() for talk in together]), expected[1])


@pytest.mark.usefixtures("roomy")
def test_a_member_that_lost_its_positions_fails_by_itself(load_span, monkeypatch):
    span = load_span("llama")
    [expected], together = alone(span, 1), talks(span)
    batches = count_batches(span, monkeypatch)
    steps = [talk.step() for talk in together]
    steps[1] = together[1].step(position=30)
    got = run_as_one(steps)
    assert isinstance(got.pop(1), Refusal)
    assert_same(got, expected[:1] + expected[2:])
    assert batches == [9]


@pytest.mark.usefixtures("roomy")
def test_a_session_whose_reordering_failed_is_lost_and_no_other(load_span, monkeypatch):
    span = load_span("llama")
    [expected], together = alone(span, 1), talks(span)
    last = together[3].cache.cache.attention_layers[-1]
    monkeypatch.setattr(last, "reorder_cache", lambda hypo_ids: 1 / 0)
    got = run_as_one([talk.step() for talk in together])
    assert isinstance(got.pop(3), Refusal)
    assert_same(got, expected[:3] + expected[4:])


@pytest.mark.slow
@pytest.mark.usefixtures("roomy")
def test_clients_that_decode_at_once_share_batches_and_one_that_leaves_harms_nobody(
    tiny_checkpoint, start_swarm, monkeypatch
):
    swarm = start_swarm(tiny_checkpoint("bloom"), [(0, NUM_BLOCKS)])
    models = [swarm.load(AutoDistributedModel, initial_peers=swarm.initial_peers) for _ in range(4)]
    layers = [remote_blocks(model) for model in models]
    inputs = [torch.randn(1, 6 + number, HIDDEN) for number in range(4)]
    expected = [layers[0].run(hidden)[0] for hidden in inputs]
    batches, outputs = count_batches(swarm.servers[0].span, monkeypatch), {}
    slow = swarm.servers[0].span.blocks[0].register_forward_hook(lambda *args: time.sleep(0.02))

    def decode(number: int) -> None:
        for repeat in range(3):
            with layers[number].inference_session(max_length=20) as session:
                pieces = [session.step(inputs[number][:, :3])]
                for at in range(3, inputs[number].shape[1]):
                    if number == 3 and repeat == 1 and at == 5:
                        break  # leaves in the middle
                    pieces.append(session.step(inputs[number][:, at : at + 1]))
            outputs[number, repeat] = torch.cat(pieces, dim=1)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slow.remove()
    assert len(outputs) == 12
    for (number, _), out in outputs.items():
        assert relative_error(out, expected[number][:, : out.shape[1]]) < 1e-5
    assert max(batches) > 1


def test_a_step_is_brief_if_the_last_one_was_and_was_no_smaller(load_span):
    talk = Talk(load_span("llama"), 3)
    assert talk.cache.last_size == 3
    assert talk.cache.last_seconds > 0
    one, three = talk.request(), talk.request(tokens=3)

    def is_brief(request: StepRequest, **options) -> bool:
        return DecodeStep(talk.span, talk.cache, request, **options).is_brief

    talk.cache.last_seconds = 1.0
    assert not is_brief(one, is_alone=True)
    talk.cache.last_seconds = 0.001
    assert is_brief(three, is_alone=True)
    assert not is_brief(three)
    talk.cache.last_size = 1
    assert is_brief(one, is_alone=True)
    assert not is_brief(three, is_alone=True)


def test_a_session_is_alone_while_no_other_was_used_of_late(load_span):
    span, store = load_span("llama"), CacheStore(max_bytes=1 << 20, lifetime=60, max_per_client=10)
    for number in range(2):
        store.put((number, 0), Talk(span, 3).cache, "client")
    assert not store.is_alone((0, 0))
    used = store.get((1, 0))
    assert used is not None
    used.last_used -= 2
    assert store.is_alone((0, 0))
    assert not store.is_alone((1, 0))


@pytest.mark.slow
def test_steps_of_the_only_session_run_on_the_event_loops_thread(tiny_checkpoint, start_swarm, monkeypatch):
    ran_on: list[str] = []
    step = BlockSpan.step

    def noted(span, *args, **kwargs):
        ran_on.append(threading.current_thread().name)
        return step(span, *args, **kwargs)

    monkeypatch.setattr(BlockSpan, "step", noted)
    monkeypatch.setattr(batched_decoding, "_BRIEF", 60.0)
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    layers = remote_blocks(swarm.load(AutoDistributedModel, shared_peer=True))
    position = torch.randn(1, 1, HIDDEN)
    ran_on.clear()
    with layers.inference_session(max_length=4) as first:
        for _ in range(3):
            first.step(position)
        assert ran_on == ["compute", "swarm", "swarm"]
        with layers.inference_session(max_length=4) as second:
            second.step(position)
            ran_on.clear()
            first.step(position)
            second.step(position)
    assert ran_on == ["compute", "compute"]
