"""How small batches are cut: the pipeline's time is that of a simulated one, and no allowed size is better."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_lightning.client.pace import Paces
from petals_lightning.client.sizing import NEGLIGIBLE, Stage, microbatch_size, pipeline_seconds

_seconds = st.floats(0, 10)
_stages = st.lists(st.builds(Stage, _seconds, _seconds), min_size=1, max_size=6)


def simulated_seconds(stages: list[Stage], count: int) -> float:
    """When the last of `count` micro-batches leaves the last stage: each stage takes them in turn, one at a time."""
    free_at = [0.0] * len(stages)
    for _ in range(count):
        now = 0.0
        for number, stage in enumerate(stages):
            now = max(now, free_at[number]) + stage.batch_seconds / count + stage.request_seconds
            free_at[number] = now
    return free_at[-1]


@given(_stages, st.integers(1, 20))
def test_a_pipeline_takes_what_a_simulated_one_takes(stages, count):
    assert pipeline_seconds(stages, count) == pytest.approx(simulated_seconds(stages, count))


@given(_stages, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_size_keeps_to_its_limits_and_no_other_number_of_pieces_is_much_quicker(stages, batch, smallest, largest):
    size = microbatch_size(batch, stages, smallest=smallest, largest=largest)
    assert 1 <= size <= min(batch, largest)
    fewest = math.ceil(batch / largest)
    seconds = {count: simulated_seconds(stages, count) for count in range(fewest, max(fewest, batch // smallest) + 1)}
    chosen = min(taken for count, taken in seconds.items() if math.ceil(batch / count) == size)
    assert chosen <= min(seconds.values()) * (1 + NEGLIGIBLE) + 1e-9


def test_one_server_gets_the_whole_batch_and_a_chain_gets_it_in_pieces():
    server = Stage(1.0, 0.02)
    sizes = [microbatch_size(32, [server] * count, smallest=1, largest=32) for count in (1, 2, 4, 8)]
    assert sizes[0] == 32
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] <= 8


def test_pieces_are_larger_where_each_costs_more():
    sizes = [microbatch_size(64, [Stage(1.0, each)] * 4, smallest=1, largest=64) for each in (0.001, 0.01, 0.1, 10.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= 8
    assert sizes[-1] == 64


def test_a_slow_wire_is_a_stage_like_a_server():
    one_server = [Stage(0.5, 0.01), Stage(1.0, 0.02)]
    assert microbatch_size(32, one_server, smallest=1, largest=32) < 16


def test_what_is_measured_settles_at_what_is_true():
    paces = Paces()
    paces.report_success("a", tokens=100, blocks=2, compute=50.0, elapsed=60.0)  # cold
    for _ in range(40):
        paces.report_success("a", tokens=100, blocks=2, compute=0.5, elapsed=0.6)
        paces.report_travel(seconds=0.25, num_elements=1000)
    speed = paces.speeds["a"]
    assert speed.tokens_per_second == pytest.approx(400, rel=0.01)
    assert (speed.hop_seconds, speed.request_tokens) == (pytest.approx(0.1, rel=0.05), 100)
    assert paces.element_seconds == pytest.approx(0.25e-3)
    paces.report_travel(seconds=-1.0, num_elements=10)  # a ping was slow once
    assert paces.element_seconds >= 0
    paces.forget_absent({"b"})
    assert not paces.speeds
