"""Where the requests of a training step are: which server has a graph, who owes an answer."""

from __future__ import annotations

from typing import Any

import torch


def peer_with_the_graph(loss: torch.Tensor) -> str:
    """The id of the server that the backward of `loss` will be sent to first."""
    return _parts(loss)[0].result.segments[-1].peers[-1]


def segment_sizes(loss: torch.Tensor) -> list[int]:
    """How many servers answered together, for each request of the first micro-batch."""
    return [len(segment.legs) for segment in _parts(loss)[0].result.segments]


def peers_at_work(blocks: Any) -> list[str]:
    """Ids of the servers that owe `blocks`, a RemoteSequential, an answer now."""
    connections = list(blocks._swarm.servers._connections.items())
    return [peer for peer, each in connections if getattr(each, "_pending", None) or getattr(each, "_under_way", 0)]


def micro_batches(loss: torch.Tensor) -> int:
    """How many requests the backward of `loss` begins with."""
    return len(_parts(loss))


def _parts(loss: torch.Tensor) -> list[Any]:
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "parts"):
            return node.parts
        nodes += [following for following, _ in node.next_functions if following is not None]
    raise AssertionError("no remote blocks in the graph")
