"""The failure suites, with servers that offer only Petals' methods, and beside some that offer ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.client import test_server_failures as steps
from tests.models import test_generation_failures as conversations
from tests.swarms import ServerProcess

checkpoint = steps.checkpoint
conversation_checkpoint = pytest.fixture(scope="module", name="conversation_checkpoint")(
    conversations.checkpoint.__wrapped__
)
ONLY_PETALS, MIXED = (0, 1, 2, 3), (0, 2)


@pytest.fixture
def start_processes() -> Iterator[Callable[..., dict[str, ServerProcess]]]:
    started: list[ServerProcess] = []

    def start(checkpoint, spans, petals_only):
        extra = [("--petals-only",) if number in petals_only else () for number in range(len(spans))]
        started.append(ServerProcess(checkpoint, spans[0], (), *extra[0]).wait_ready())
        peers = [started[0].maddr]
        others = [ServerProcess(checkpoint, s, peers, *e) for s, e in zip(spans[1:], extra[1:], strict=True)]
        started.extend(others)
        for server in others:
            server.wait_ready()
        return {server.peer_id: server for server in started}

    yield start
    for server in started:
        server.stop()


@pytest.mark.parametrize(
    ("phase", "layout", "petals_only"),
    [("between", "same span", ONLY_PETALS), ("backward", "cut elsewhere", MIXED)],
)
def test_a_killed_server_changes_no_loss_and_no_gradient(phase, layout, petals_only, checkpoint, start_processes):
    steps.test_a_killed_server_changes_no_loss_and_no_gradient(
        phase, steps.LAYOUTS[layout], checkpoint, lambda spans: start_processes(checkpoint, spans, petals_only)
    )


def test_a_hung_server_costs_seconds(checkpoint, start_processes):
    steps.test_a_hung_server_costs_seconds(checkpoint, lambda spans: start_processes(checkpoint, spans, ONLY_PETALS))


@pytest.mark.parametrize("petals_only", [ONLY_PETALS, MIXED], ids=["only petals", "mixed"])
def test_lost_servers_change_no_token(petals_only, conversation_checkpoint, start_processes):
    servers = start_processes(conversation_checkpoint, [(0, 4)] * 4, petals_only)
    conversations.test_lost_servers_change_no_token(conversation_checkpoint, servers)
