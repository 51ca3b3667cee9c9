"""The growing cache layer does what transformers' DynamicLayer does, without copying the past at every step."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from petals_lightning.server.blocks.kv_cache import GrowingLayer

BATCH, HEADS, KEY, VALUE, MAX = 3, 2, 4, 5, 400
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("crop"), st.integers(0, 30)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, min_size=1, max_size=12))
def test_any_sequence_of_operations_equals_the_dynamic_layer(operations):
    ours: Any = GrowingLayer(MAX + 80)
    theirs: Any = DynamicLayer()
    for name, argument in [("append", 2), *operations]:
        if name == "append":
            keys, values = torch.randn(BATCH, HEADS, argument, KEY), torch.randn(BATCH, HEADS, argument, VALUE)
            for got, expected in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
                assert torch.equal(got, expected)
        elif name == "crop":
            # To crop to 0 drops all, up to transformers 5.13.
            if removed := min(argument, theirs.get_seq_length() - 1):
                ours.crop(-removed)
                theirs.crop(-removed)
        else:
            ours.reorder_cache(torch.tensor(argument))
            theirs.reorder_cache(torch.tensor(argument))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)
        assert torch.equal(ours.keys, theirs.keys)


def test_steps_write_in_place_and_buffers_stay_within_the_reservation():
    layer, starts = GrowingLayer(100), set()
    for _ in range(100):
        keys, _ = layer.update(torch.randn(1, 1, 1, KEY), torch.randn(1, 1, 1, VALUE))
        starts.add(keys.data_ptr())
    assert len(starts) == 2, "64 positions, then all 100"
