"""Choosing a chain of servers. Pure functions from what is known of the servers to a route.

The shortest path over block boundaries: to be on server s after block b costs the cheaper of having been on s before
it, or of arriving there from anywhere, plus the block's time on s. Blocks are numbered, so the graph has no cycles, and
one sweep over the blocks replaces Dijkstra's search, for all servers at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ServerSpan:
    """A server and the cost of using it.

    Attributes:
        peer: base58 peer id.
        start, end: blocks held.
        hop_seconds: time to send a request of this size and get its answer back.
        block_seconds: time of one block for a request of this size. Both times are finite.
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
    """The fastest chain through blocks [start, end), or None if no server holds some block."""
    first, last = (np.array([getattr(s, name) for s in servers]) for name in ("start", "end"))
    hop, block_time = (np.array([getattr(s, name) for s in servers]) for name in ("hop_seconds", "block_seconds"))
    # Between ends of spans costs are linear, so no change of servers is cheaper than one at such an end.
    cuts = sorted({start, end, *(cut for cut in (*first.tolist(), *last.tolist()) if start < cut < end)})
    # For each server, at the current cut: the cost of being there, and the block at which it was entered.
    on, since = np.full(len(servers), np.inf), np.full(len(servers), start)
    best = 0.0
    ways: dict[int, tuple[int, int]] = {}  # for each cut: the cheapest server to it, and where that is entered
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
    """The cost of a route with these servers, or None if one is missing or no longer holds its blocks."""
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
    """Formats block numbers as ranges: `[0, 1, 2, 5]` is `0:3, 5`."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][1] == block:
            ranges[-1][1] = block + 1
        else:
            ranges.append([block, block + 1])
    return ", ".join(f"{a}:{b}" if b - a > 1 else str(a) for a, b in ranges)
