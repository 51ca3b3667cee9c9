"""Time to plan a route over 1,000 servers and 80 blocks, against the same problem given to scipy's Dijkstra.

    python -m benchmarks.routing

Swarms with spans of few blocks, of mixed lengths, and of servers that all hold everything. Both sides find routes of
the same cost, or the benchmark ends with an error. Seconds of processor time, medians of repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import typer

from benchmarks.options import Output
from benchmarks.rounds import alternate, report
from petals_lightning.client.routing import plan_route, route_seconds
from tools.testing.routing import random_servers, scipy_cost


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
