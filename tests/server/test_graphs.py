"""Kept graphs stay within their budget and their time."""

from __future__ import annotations

import weakref

import pytest
import torch

from petals_lightning.server.blocks.graphs import GraphStore
from petals_lightning.server.blocks.span import SpanGraph, SpanInputs
from tests.helpers.clocks import Clock


def graph(num_bytes: int = 10) -> SpanGraph:
    return SpanGraph(SpanInputs(0, 1, torch.zeros(1, 1, 1)), [], {}, num_bytes)


def test_a_graph_is_taken_once():
    store, kept = GraphStore(100, 60), graph()
    store.put((1, 1), kept)
    assert store.num_bytes == 10
    assert store.pop((1, 2)) is None
    assert store.pop((1, 1)) is kept
    assert store.pop((1, 1)) is None
    assert store.num_bytes == 0


def test_room_is_made_by_dropping_the_oldest():
    store = GraphStore(30, 60)
    for call in (1, 2, 3):
        store.put((1, call), graph())
    assert store.make_room(15)
    assert [store.pop((1, call)) is not None for call in (1, 2, 3)] == [False, False, True]


def test_a_client_that_has_most_loses_first():
    store = GraphStore(40, 60)
    store.put((1, 1), graph(), "modest")
    for call in range(10):
        store.put((2, call), graph(), "greedy")
    assert store.pop((1, 1)) is not None
    assert [call for call in range(10) if store.pop((2, call))] == [7, 8, 9]
    assert store.num_bytes == 0


def test_what_never_fits_drops_nothing():
    store = GraphStore(30, 60)
    store.put((1, 1), graph())
    assert not store.make_room(31)
    assert store.pop((1, 1)) is not None


def test_the_budget_holds_when_many_were_promised_the_same_room():
    store = GraphStore(30, 60)
    assert all(store.make_room(10) for _ in range(10))
    for call in range(10):
        store.put((1, call), graph())
        assert store.num_bytes <= 30
    assert [call for call in range(10) if store.pop((1, call))] == [7, 8, 9]


def test_a_key_used_twice_is_counted_once():
    store = GraphStore(30, 60)
    store.put((1, 1), graph(20))
    store.put((1, 1), graph(10))
    assert store.num_bytes == 10
    store.pop((1, 1))
    assert store.num_bytes == 0


def test_graphs_do_not_outlive_their_time():
    clock = Clock()
    store = GraphStore(100, 60, clock)
    store.put((1, 1), graph())
    store.put((1, 2), graph())
    clock.now += 61
    store.put((1, 3), graph())
    assert store.num_bytes == 10
    clock.now += 61
    store.expire()
    assert store.num_bytes == 0


def test_the_end_of_a_stream_frees_its_graphs_only():
    store = GraphStore(100, 60)
    gone = graph()
    tensor = weakref.ref(gone.inputs.hidden)
    store.put((1, 1), gone)
    store.put((2, 1), graph())
    del gone
    store.drop_stream(1)
    assert tensor() is None
    assert store.num_bytes == 10
    assert store.pop((2, 1)) is not None


@pytest.mark.parametrize("num_bytes", [0, 30])
def test_clear_leaves_nothing(num_bytes):
    store = GraphStore(30, 60)
    store.put((1, 1), graph(num_bytes))
    store.clear()
    assert store.num_bytes == 0
    assert store.pop((1, 1)) is None
