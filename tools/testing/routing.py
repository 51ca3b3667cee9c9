"""Problems of routing, and their least cost by scipy's Dijkstra."""

from __future__ import annotations

import random

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from petals_lightning.client.routing import ServerSpan


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
