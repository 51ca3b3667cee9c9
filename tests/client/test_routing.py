"""The planned route is the cheapest there is, by comparison with all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.client.routing import RouteSpan, ServerSpan, format_blocks, plan_route, route_seconds, uncovered
from tools.testing.routing import random_servers, scipy_cost


def cost_of(route: list[RouteSpan], servers: list[ServerSpan]) -> float:
    by_peer = {server.peer: server for server in servers}
    return sum(
        by_peer[leg.peer_id].hop_seconds + (leg.end - leg.start) * by_peer[leg.peer_id].block_seconds for leg in route
    )


def cheapest(servers: list[ServerSpan], start: int, end: int) -> float | None:
    """The cost of the best of all ways to give every block to a server that holds it."""
    holders = [[s for s in servers if s.start <= block < s.end] for block in range(start, end)]
    costs = []
    for choice in itertools.product(*holders):
        hops = sum(server.hop_seconds for server, _ in itertools.groupby(choice))
        costs.append(hops + sum(server.block_seconds for server in choice))
    return min(costs, default=None)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[ServerSpan], int, int]:
    blocks = draw(st.integers(1, 6))
    servers = []
    for number in range(draw(st.integers(0, 4))):
        first, last = sorted(draw(st.tuples(st.integers(0, blocks), st.integers(0, blocks))))
        hop, block = draw(st.integers(0, 20)), draw(st.integers(0, 10))  # whole numbers: sums compare exactly
        servers.append(ServerSpan(f"peer{number}", first, last + 1, hop, block))
    start, end = sorted(draw(st.tuples(st.integers(0, blocks), st.integers(0, blocks))))
    return servers, start, end + 1


@settings(max_examples=300, deadline=None)
@given(swarms())
def test_a_route_covers_the_span_at_the_least_cost(swarm):
    servers, start, end = swarm
    route = plan_route(servers, start, end)
    if route is None:
        assert uncovered(servers, start, end)
        return
    assert uncovered(servers, start, end) == []
    held = {server.peer: server for server in servers}
    assert [leg.start for leg in route] == [start, *(leg.end for leg in route[:-1])]
    assert route[-1].end == end
    assert all(held[leg.peer_id].start <= leg.start < leg.end <= held[leg.peer_id].end for leg in route)
    assert cost_of(route, servers) == route_seconds(servers, route) == cheapest(servers, start, end)


def test_a_route_through_a_server_that_left_or_moved_has_no_cost():
    route, a = [RouteSpan("a", 0, 2), RouteSpan("b", 2, 4)], ServerSpan("a", 0, 2, 1.0, 1.0)
    assert route_seconds([a, ServerSpan("b", 1, 5, 0.5, 0.25)], route) == 4.0
    assert route_seconds([a], route) is None
    assert route_seconds([a, ServerSpan("b", 3, 5, 0.5, 0.25)], route) is None


def test_no_server_gives_no_route():
    assert plan_route([], 0, 2) is None
    assert plan_route([ServerSpan("a", 0, 1, 0, 1), ServerSpan("b", 2, 3, 0, 1)], 0, 3) is None


def test_the_faster_server_takes_the_blocks_that_it_holds():
    servers = [ServerSpan("slow", 0, 8, 0.001, 1.0), ServerSpan("fast", 2, 6, 0.001, 0.1)]
    assert plan_route(servers, 0, 8) == [RouteSpan("slow", 0, 2), RouteSpan("fast", 2, 6), RouteSpan("slow", 6, 8)]


def test_one_hop_beats_faster_blocks_where_latency_dominates():
    servers = [ServerSpan("slow", 0, 8, 1.0, 0.01), ServerSpan("fast", 2, 6, 1.0, 0.001)]
    assert plan_route(servers, 0, 8) == [RouteSpan("slow", 0, 8)]


def test_a_part_of_the_model_is_routed_within_that_part():
    servers = [ServerSpan("a", 0, 4, 0.1, 1.0), ServerSpan("b", 3, 8, 0.1, 1.0)]
    assert plan_route(servers, 5, 6) == [RouteSpan("b", 5, 6)]
    assert plan_route(servers, 2, 5) == [RouteSpan("a", 2, 4), RouteSpan("b", 4, 5)] or plan_route(servers, 2, 5) == [
        RouteSpan("a", 2, 3), RouteSpan("b", 3, 5),
    ]  # fmt: skip


def test_uncovered_names_the_blocks_that_nobody_holds():
    servers = [ServerSpan("a", 1, 3, 0, 1), ServerSpan("b", 2, 4, 0, 1), ServerSpan("c", 6, 9, 0, 1)]
    assert uncovered(servers, 0, 8) == [0, 4, 5]
    assert uncovered(servers, 1, 4) == []
    assert uncovered([], 3, 5) == [3, 4]


@pytest.mark.parametrize(
    ("blocks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0:3, 5"), ([1, 2], "1:3"), ([0, 2, 4, 5], "0, 2, 4:6")]
)
def test_blocks_are_named_as_ranges(blocks, text):
    assert format_blocks(blocks) == text


@pytest.mark.parametrize(("shortest", "longest"), [(1, 3), (1, 80), (5, 12), (80, 80)])
def test_the_route_over_a_thousand_servers_costs_what_scipys_dijkstra_finds(shortest, longest):
    servers = random_servers(1000, 80, shortest, longest)
    route = plan_route(servers, 0, 80)
    assert route is not None
    assert cost_of(route, servers) == pytest.approx(scipy_cost(servers, 80), rel=1e-12)
