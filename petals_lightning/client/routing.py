"""Choosing a chain of servers. Pure: takes what is known of servers, gives a route.

The shortest path over block boundaries: being on server s after block b costs the cheaper of having been on s before
it, or of arriving there from anywhere, plus the block's time on s. Blocks are numbered, so the graph has no cycles and
Dijkstra's search is one sweep over them, for all servers at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ServerSpan:
    """A server and what using it costs.

    Attributes:
        peer: base58 peer id.
        start, end: blocks held.
        hop_seconds: time to get a request of this size there and its answer back.
        block_seconds: time of one block for a request of this size. Both are finite.
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
    first, last = (np.array([getattr(s, name) for s in servers]) for name in ("start", "end"))
    hop, block_time = (np.array([getattr(s, name) for s in servers]) for name in ("hop_seconds", "block_seconds"))
    # Costs are linear between the ends of spans, so no change of servers elsewhere is better than one there.
    cuts = sorted({start, end, *(cut for cut in (*first.tolist(), *last.tolist()) if start < cut < end)})
    # Of each server, at the current cut: the cost of being there, and since which block.
    on, since = np.full(len(servers), np.inf), np.full(len(servers), start)
    best = 0.0
    ways: dict[int, tuple[int, int]] = {}  # to each cut: the server that leads there for the least, and since when
    for cut, following in itertools.pairwise(cuts):
        held = (first <= cut) & (last > cut)
        if not held.any():
            return None
        arriving = best + hop
        comes = arriving < on
        since[comes] = cut
        on = np.where(held, np.where(comes, arriving, on) + (following - cut) * block_time, np.inf)
        cheapest = int(on.argmin())
        best = on[cheapest]
        ways[following] = cheapest, int(since[cheapest])
    route: list[RouteSpan] = []
    stop = end
    while stop > start:
        number, entered = ways[stop]
        route.append(RouteSpan(servers[number].peer, entered, stop))
        stop = entered
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
