"""Time to plan a route over 1,000 servers and 80 blocks, against the same problem given to scipy's Dijkstra.

    python -m benchmarks.routing

Swarms with spans of few blocks, of mixed lengths, and of servers that all hold everything. Both sides find routes of
the same cost, or the benchmark ends with an error. Seconds of processor time, medians of repeats.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import typer
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from benchmarks.options import Output
from benchmarks.rounds import alternate, report
from petals_lightning.client.routing import ServerSpan, plan_route, route_seconds


def random_servers(count: int, blocks: int, shortest: int, longest: int) -> list[ServerSpan]:
    """Servers that between them hold all blocks; costs are whole milliseconds."""
    draw = random.Random(0)
    servers = []
    for number in range(count):
        length = draw.randint(shortest, longest)
        first = draw.randint(0, blocks - length)
        hop, block = draw.randint(1, 200) / 1e3, draw.randint(1, 100) / 1e3
        servers.append(ServerSpan(f"peer{number}", first, first + length, hop, block))
    return servers


def scipy_cost(servers: list[ServerSpan], blocks: int) -> float:
    """The least cost through all blocks: an edge from a to b for every part of every span."""
    cheapest = np.full((blocks + 1, blocks + 1), np.inf)
    for server in servers:
        first, end = np.triu_indices(server.end - server.start + 1, 1)
        seconds = server.hop_seconds + (end - first) * server.block_seconds
        first, end = first + server.start, end + server.start
        cheapest[first, end] = np.minimum(cheapest[first, end], seconds)
    first, end = np.isfinite(cheapest).nonzero()
    graph = csr_array((cheapest[first, end], (first, end)), shape=cheapest.shape)
    return float(dijkstra(graph, indices=0)[blocks])


def timed(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def main(
    servers: int = 1000,
    blocks: int = 80,
    repeats: int = 9,
    output: Output = None,
) -> None:
    """Prints a row per kind of swarm, in milliseconds."""
    rows = []
    for name, shortest, longest in (
        ("spans of 1 to 10 blocks", 1, min(10, blocks)),
        ("spans of 1 block to all", 1, blocks),
        ("all hold all", blocks, blocks),
    ):
        swarm = random_servers(servers, blocks, shortest, longest)
        route = plan_route(swarm, 0, blocks)
        assert route is not None
        ours, theirs = route_seconds(swarm, route), scipy_cost(swarm, blocks)
        if ours is None or abs(ours - theirs) > 1e-9:
            raise SystemExit(f"{name}: the planned route costs {ours} s, scipy's {theirs} s")
        seconds = alternate(
            {
                "ours": partial(timed, partial(plan_route, swarm, 0, blocks)),
                "scipy": partial(timed, partial(scipy_cost, swarm, blocks)),
            },
            repeats,
        )
        rows.append((name, seconds["ours"] * 1e3, seconds["scipy"] * 1e3))
    report(f"a route over {servers} servers × {blocks} blocks, ms", ("ours", "scipy", "ours / scipy"), rows, output)


if __name__ == "__main__":
    typer.run(main)
