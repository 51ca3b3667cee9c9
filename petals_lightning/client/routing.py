"""Choosing a chain of servers. Pure: takes what is known of servers, gives a route.

The shortest path over block boundaries: being on server s after block b costs the cheaper of having been on s before
it, or of arriving there from anywhere, plus the block's time on s. Blocks are numbered, so the graph has no cycles and
Dijkstra's search is one sweep over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSpan:
    """A server and what using it costs.

    Attributes:
        peer: base58 peer id.
        start, end: blocks held.
        hop_seconds: time to get a request of this size there and its answer back.
        block_seconds: time of one block for a request of this size.
    """

    peer: str
    start: int
    end: int
    hop_seconds: float
    block_seconds: float


@dataclass(frozen=True)
class RouteSpan:
    """One leg of a route: blocks [start, end) on a server."""

    peer_id: str
    start: int
    end: int
    public_name: str | None = None


def plan_route(servers: Sequence[ServerSpan], start: int, end: int) -> list[RouteSpan] | None:
    """The fastest chain through blocks [start, end), or None if some block is held by nobody."""
    arriving: dict[int, list[ServerSpan]] = {}
    for server in servers:
        if server.start < end and server.end > start:
            arriving.setdefault(max(server.start, start), []).append(server)
    # on: cost and legs of being on a server at the current boundary; legs are linked lists (peer, since, before).
    active: list[ServerSpan] = []
    on: dict[str, tuple[float, tuple]] = {}
    best: tuple[float, tuple | None] = (0.0, None)
    for block in range(start, end):
        active = [s for s in active if s.end > block] + arriving.get(block, [])
        if not active:
            return None
        reached: dict[str, tuple[float, tuple]] = {}
        for server in active:
            cost, legs = best[0] + server.hop_seconds, (server.peer, block, best[1])
            staying = on.get(server.peer)
            if staying is not None and staying[0] <= cost:
                cost, legs = staying
            reached[server.peer] = (cost + server.block_seconds, legs)
        on = reached
        best = min(on.values(), key=lambda item: item[0])
    route: list[RouteSpan] = []
    leg, stop = best[1], end
    while leg is not None:
        peer, since, before = leg
        route.append(RouteSpan(peer, since, stop))
        leg, stop = before, since
    return route[::-1]


def route_seconds(servers: Sequence[ServerSpan], route: Sequence[RouteSpan]) -> float | None:
    """What a route costs with these servers, or None if one of them is missing or holds other blocks now."""
    by_peer = {server.peer: server for server in servers}
    total = 0.0
    for leg in route:
        server = by_peer.get(leg.peer_id)
        if server is None or not server.start <= leg.start < leg.end <= server.end:
            return None
        total += server.hop_seconds + (leg.end - leg.start) * server.block_seconds
    return total


def uncovered(servers: Sequence[ServerSpan], start: int, end: int) -> list[int]:
    """The blocks of [start, end) that no server holds."""
    held: set[int] = set()
    for server in servers:
        held.update(range(max(server.start, start), min(server.end, end)))
    return [block for block in range(start, end) if block not in held]


def format_blocks(blocks: Sequence[int]) -> str:
    """Block numbers as ranges for people: `[0, 1, 2, 5]` is `0:3, 5`."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block:
            ranges[-1][1] = block + 1
        else:
            ranges.append([block, block + 1])
    return ", ".join(f"{a}:{b}" if b - a > 1 else str(a) for a, b in ranges)
