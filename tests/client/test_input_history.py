"""Inputs kept for a replay are those that a server would have, after any reordering and rolling back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.client.input_history import InputHistory

BATCH, HIDDEN = 3, 2
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("crop"), st.integers(0, 12), st.none()),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATIONS, max_size=12), st.integers(0, 10))
def test_any_sequence_of_operations_equals_doing_them_at_once(operations, start):
    history = InputHistory()
    hidden, ids = torch.empty(BATCH, 0, HIDDEN), torch.empty(BATCH, 0, dtype=torch.long)
    for name, argument, unusual in operations:
        if name == "append":
            new, first = torch.randn(BATCH, argument, HIDDEN), hidden.shape[1]
            new_ids = torch.arange(first, first + argument).expand(BATCH, -1)
            if unusual:
                new_ids = torch.randint(0, 50, (BATCH, argument))
            history.append(new, new_ids if unusual else None)
            hidden, ids = torch.cat([hidden, new], dim=1), torch.cat([ids, new_ids], dim=1)
        elif name == "crop":
            history.crop(argument)
            hidden, ids = hidden[:, :argument], ids[:, :argument]
        else:
            history.reorder(torch.tensor(argument))
            hidden, ids = hidden[argument], ids[argument]
        assert history.length == hidden.shape[1]
    if start < history.length:
        got, got_ids = history.read(start)
        assert torch.equal(got, hidden[:, start:])
        if got_ids is not None:
            assert torch.equal(got_ids, ids[:, start:])
        else:
            assert torch.equal(ids[:, start:], torch.arange(start, history.length).expand(BATCH, -1))
