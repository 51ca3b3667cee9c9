"""A new server goes where the swarm is thinnest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.server.server import thinnest_span


@pytest.mark.parametrize(
    ("throughput", "length", "span"),
    [
        ([0, 0, 0, 0], 2, (0, 2)),
        ([1, 1, 0, 0, 1], 2, (2, 4)),
        ([5, 5, 0, 5, 5, 1], 2, (1, 3)),  # a block that nobody holds, and the leftmost of equals
        ([3, 2, 1, 2, 3], 3, (1, 4)),
        ([1, 0, 9, 0, 2], 3, (1, 4)),  # two blocks without a server count more than a small sum
        ([2, 1], 5, (0, 2)),
        ([4], 1, (0, 1)),
    ],
)
def test_the_thinnest_window_is_taken(throughput, length, span):
    assert thinnest_span(throughput, length) == span


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.integers(1, 14))
def test_the_span_fits_the_model_and_holds_a_weakest_block(throughput, length):
    start, end = thinnest_span(throughput, length)
    assert 0 <= start < end <= len(throughput)
    assert end - start == min(length, len(throughput))
    assert min(throughput) in throughput[start:end]


def test_servers_that_join_one_by_one_cover_the_model():
    held = [0.0] * 7
    for _ in range(4):
        start, end = thinnest_span(held, 2)
        held[start:end] = [value + 1 for value in held[start:end]]
    assert min(held) > 0
