"""Where servers go: new ones to the thinnest place, running ones only if the swarm's bottleneck gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.server.placement import (
    PlacedServer,
    block_throughput,
    expected_throughput,
    placed_servers,
    plan_moves,
    planned_span,
    thinnest_span,
)


def holders(throughput):
    """A server for each block."""
    return [PlacedServer(f"{n:02}", n, n + 1, each) for n, each in enumerate(throughput)]


def movable(*spans, throughput=1.0):
    return [PlacedServer(f"{n:02}", start, end, throughput, True) for n, (start, end) in enumerate(spans)]


def after(servers, moves):
    return [replace(each, next_span=moves.get(each.peer, each.next_span)) for each in servers]


@pytest.mark.parametrize(
    ("throughput", "length", "span"),
    [
        ([0, 0, 0, 0], 2, (0, 2)),
        ([1, 1, 0, 0, 1], 2, (2, 4)),
        ([5, 5, 0, 5, 5, 1], 2, (1, 3)),  # a block that nobody holds, and the leftmost of equals
        ([1, 2, 0, 1], 2, (2, 4)),  # beside the hole, the weaker neighbour
        ([3, 2, 1, 2, 3], 3, (1, 4)),
        ([1, 0, 9, 0, 2], 3, (1, 4)),  # two blocks without a server count more than a small sum
        ([2, 1], 5, (0, 2)),
        ([4], 1, (0, 1)),
    ],
)
def test_a_new_server_takes_the_thinnest_place(throughput, length, span):
    assert thinnest_span(holders(throughput), len(throughput), length, 1.0) == span


def test_servers_that_join_one_by_one_cover_the_model():
    servers: list[PlacedServer] = []
    for number in range(4):
        start, end = thinnest_span(servers, 7, 2, 1.0)
        servers.append(PlacedServer(f"{number}", start, end, 1.0))
    assert block_throughput(servers, 7).min() > 0


def test_records_become_places():
    def record(start, end, state=ServerState.ONLINE, **more):
        return ServerRecord(state, 2.0, start, end, **more)

    joining = record(2, 4, ServerState.JOINING)
    moving = record(0, 2, next_start=1, next_end=3, can_move=True)
    gone, outside = record(0, 1, ServerState.OFFLINE), record(0, 1, next_start=3, next_end=9)
    remains = ServerRecord(ServerState.ONLINE, 2.0)  # of a Petals server, under blocks that it held before
    table = [
        {"m": moving, "g": gone, "o": outside, "p": remains},
        {"m": moving},
        {"j": joining},
        {"j": joining, "p": remains},
    ]  # fmt: skip
    assert placed_servers(table) == [
        PlacedServer("j", 2, 4, 2.0),
        PlacedServer("m", 0, 2, 2.0, True, (1, 3)),
        PlacedServer("o", 0, 1, 2.0),
        PlacedServer("p", 0, 1, 2.0),
    ]
    assert block_throughput(placed_servers(table), 4).tolist() == [4, 2, 4, 2]


def test_a_server_without_a_measurement_counts_as_others_of_its_length_would():
    assert expected_throughput([], 3) == 1.0
    assert expected_throughput([PlacedServer("a", 0, 4, 3.0), PlacedServer("b", 0, 2, 6.0)], 6) == 2.0


def test_one_of_three_fills_the_hole():
    servers = movable((0, 2), (0, 2), (0, 2))
    moves = plan_moves(servers, 4, 0.9)
    assert list(moves.values()) == [(2, 4)]
    assert plan_moves(after(servers, moves), 4, 0.9) == {}, "another one would only move the hole"


def test_nobody_moves_for_less_than_the_stated_share():
    fixed = PlacedServer("f", 0, 1, 11.5), PlacedServer("g", 1, 2, 10.0)
    servers = [*movable(*[(0, 1)] * 3, throughput=0.5), *fixed]
    assert plan_moves(servers, 2, 0.9) == {}, "10 would become 11"
    assert len(plan_moves(servers, 2, 0.95)) == 2


def test_servers_that_may_not_move_and_servers_that_hold_all_stay():
    servers = movable((0, 2), (0, 2), (0, 4))
    fixed = [replace(each, can_move=False) for each in servers[:2]]
    assert plan_moves([*fixed, servers[2]], 4, 0.9) == {}
    assert plan_moves([fixed[0], *servers[1:]], 4, 0.5) == {}, "1 would become 2, which is not more than 1 / 0.5"
    assert plan_moves([fixed[0], *servers[1:]], 4, 0.9) == {servers[1].peer: (2, 4)}
    assert plan_moves(servers, 4, 0.0) == {}


def test_several_holes_are_filled_by_one_plan():
    servers = movable(*[(0, 2)] * 5)
    moves = plan_moves(servers, 8, 0.9)
    assert sorted(moves.values()) == [(2, 4), (4, 6), (6, 8)]


def test_of_two_that_announce_the_same_hole_one_goes():
    servers = movable((0, 2), (0, 2), (0, 2))
    both = [replace(servers[0], next_span=(2, 4)), replace(servers[1], next_span=(2, 4)), servers[2]]
    answers = [planned_span(both, each.peer, 4, 0.9, each.next_span) for each in both]
    assert answers == [(2, 4), None, None]
    first = [servers[0], *both[1:]]
    assert planned_span(first, servers[0].peer, 4, 0.9) is None, "the hole is taken"
    first[0] = replace(first[0], can_move=False)
    assert planned_span(first, servers[1].peer, 4, 0.9, (2, 4)) == (2, 4), "nobody else has announced"


SPANS = st.tuples(st.integers(0, 9), st.integers(1, 4)).map(lambda given: (given[0], min(given[0] + given[1], 10)))
SERVERS = st.lists(st.tuples(SPANS, st.floats(0.1, 50), st.booleans()), max_size=14).map(
    lambda found: [PlacedServer(f"{n:02}", *span, speed, moves) for n, (span, speed, moves) in enumerate(found)]
)


@settings(deadline=None)
@given(SERVERS, st.floats(0.3, 1))
def test_moves_end_and_each_plan_raises_the_bottleneck(servers, quality):
    for _ in range(60):
        moves, before = plan_moves(servers, 10, quality), block_throughput(servers, 10)
        if not moves:
            break
        moved = {each.peer: each for each in servers if each.peer in moves}
        for peer, (start, end) in moves.items():
            assert moved[peer].can_move
            assert 0 <= start < end <= 10
            assert end - start == moved[peer].end - moved[peer].start
        servers = [replace(each, start=s, end=e) for each in servers for s, e in [moves.get(each.peer, each.span)]]
        assert block_throughput(servers, 10).min() > before.min() / quality
    else:
        pytest.fail("servers move for ever")


@settings(deadline=None)
@given(SERVERS, st.integers(1, 12), st.floats(0.1, 10))
def test_a_new_servers_span_fits_and_holds_a_weakest_block_that_nobody_holds(servers, length, throughput):
    start, end = thinnest_span(servers, 10, length, throughput)
    assert 0 <= start < end <= 10
    assert end - start == min(length, 10)
    held = block_throughput(servers, 10)
    assert held.min() > 0 or (held[start:end] == 0).any()
