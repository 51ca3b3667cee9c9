"""Where the requests of a training step are: which server has a graph, who owes an answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList

from petals_lightning.models import remote_blocks
from tests.helpers.parity import assert_same_gradients
from tools.testing.swarms import InProcessSwarm


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


def assert_a_lost_server_changes_no_gradient(
    phase: str, swarm: InProcessSwarm, remote: Any, local: Any, loss_of: Callable[[Any], torch.Tensor], leg: int = 0
) -> None:
    """Stops a server before a step's forward (that of a leg) or before its backward (that with the graph)."""
    if phase == "forward":
        loss_of(remote)
        swarm.by_id[remote_blocks(remote).route()[leg].peer_id].stop(timeout=0)
    loss, expected = loss_of(remote), loss_of(local)
    if phase == "backward":
        swarm.by_id[peer_with_the_graph(loss)].stop(timeout=0)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


def stops_a_server(swarm: InProcessSwarm, conversation: Any) -> StoppingCriteriaList:
    """For `generate` in a session: its first server is lost before the fifth token; the generation goes on."""
    calls = itertools.count(1)

    def stop(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if next(calls) == 4:
            lost = swarm.by_id[conversation.peers[0]]
            lost.stop(timeout=0.1)
            swarm.servers.remove(lost)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    return StoppingCriteriaList([stop])
