"""What a client learns of servers' speeds, and how small it cuts batches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_lightning.client.router import microbatch_size
from petals_lightning.client.speed import SpeedEstimates

_numbers = st.integers(1, 200)


@given(_numbers, _numbers, _numbers, _numbers)
def test_micro_batches_keep_to_their_limits_and_are_as_equal_as_they_go(batch, count, smallest, largest):
    size = microbatch_size(batch, count, smallest=smallest, largest=largest)
    assert 1 <= size <= min(batch, largest)
    pieces = math.ceil(batch / size)
    assert math.ceil(batch / pieces) == size
    if smallest <= batch / count <= largest:
        assert pieces <= count


@pytest.mark.parametrize(("count", "size"), [(1, 32), (4, 8), (16, 2), (100, 1)])
def test_a_batch_is_cut_into_about_as_many_micro_batches_as_asked_for(count, size):
    assert microbatch_size(32, count, smallest=1, largest=32) == size


def test_what_is_measured_settles_at_what_is_true():
    speeds = SpeedEstimates()
    speeds.report_success("a", tokens=100, blocks=2, compute=50.0, elapsed=60.0)  # cold
    for _ in range(40):
        speeds.report_success("a", tokens=100, blocks=2, compute=0.5, elapsed=0.6)
    speed = speeds.by_peer["a"]
    assert speed.tokens_per_second == pytest.approx(400, rel=0.01)
    assert speed.hop_seconds == pytest.approx(0.1, rel=0.05)
    speeds.forget_absent({"b"})
    assert not speeds.by_peer
