"""The failure suites, with servers that offer only Petals' methods, and beside some that offer ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from tests.client import test_server_failures as steps
from tests.models import test_generation_failures as conversations
from tests.swarms import ServerProcess

checkpoint = steps.checkpoint
conversation_checkpoint = pytest.fixture(scope="module", name="conversation_checkpoint")(
    conversations.checkpoint.__wrapped__
)
ONLY_PETALS, MIXED = (0, 1, 2, 3), (0, 2)


def with_petals(start_servers: Callable, petals_only: Sequence[int]) -> Callable[..., dict[str, ServerProcess]]:
    return partial(start_servers, petals_only=petals_only)


@pytest.mark.parametrize(
    ("phase", "layout", "petals_only"),
    [("between", "same span", ONLY_PETALS), ("backward", "cut elsewhere", MIXED)],
)
def test_a_killed_server_changes_no_loss_and_no_gradient(phase, layout, petals_only, checkpoint, start_servers):
    steps.test_a_killed_server_changes_no_loss_and_no_gradient(
        phase, steps.LAYOUTS[layout], checkpoint, with_petals(start_servers, petals_only)
    )


def test_a_hung_server_costs_seconds(checkpoint, start_servers):
    steps.test_a_hung_server_costs_seconds(checkpoint, with_petals(start_servers, ONLY_PETALS))


@pytest.mark.parametrize("petals_only", [ONLY_PETALS, MIXED], ids=["only petals", "mixed"])
def test_lost_servers_change_no_token(petals_only, conversation_checkpoint, start_servers):
    conversations.test_lost_servers_change_no_token(conversation_checkpoint, with_petals(start_servers, petals_only))
