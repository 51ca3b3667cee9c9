"""A quick part of the attacks; `python -m tests.hostile` runs all of them and prints what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.harness import Arena
from tests.hostile.servers import SERVERS

pytestmark = [pytest.mark.ours("Petals' servers are not attacked here"), pytest.mark.slow]


@pytest.fixture(scope="module")
def arena(heavier_checkpoint: Path) -> Iterator[Arena]:
    with Arena(heavier_checkpoint) as arena:
        yield arena


@pytest.mark.parametrize("attack", ["records: a flood on keys", "memory: sessions", "fails in backward"])
def test_an_attack_costs_little(attack: str, arena: Arena) -> None:
    outcome = arena.run(attack, alone_seconds=1.0)  # the share, which needs more, is not looked at
    print(f"{attack}: {outcome}")
    broken = outcome.broken_promises(is_server=attack in SERVERS)
    # Speed is measured by the whole table; here others share the processors.
    assert not [words for words in broken if not words.startswith(("a share", "a step"))]
