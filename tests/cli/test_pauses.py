"""Servers that leave the machine to its owner for a while."""

from __future__ import annotations

import signal
import time as clock
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from petals_lightning.cli.pauses import QuietHours
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from tests.helpers.families import NUM_BLOCKS, VOCAB
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX

HOURS = [
    ("09:00-17:30", "09:00", True),
    ("09:00-17:30", "17:29:59", True),
    ("09:00-17:30", "17:30", False),
    ("09:00-17:30", "08:59", False),
    ("22:00-06:00", "23:59", True),
    ("22:00-06:00", "00:00", True),
    ("22:00-06:00", "06:00", False),
    ("22:00 - 06:00", "12:00", False),
]


@pytest.mark.parametrize(("hours", "now", "inside"), HOURS)
def test_quiet_hours_contain_times(hours: str, now: str, inside: bool) -> None:
    assert QuietHours(hours).contain(time.fromisoformat(now)) is inside


@pytest.mark.parametrize("hours", ["9-17", "09:00", "09:00-25:00", "09:00-12:00-17:00", "x", "09:00-09:00"])
def test_what_is_no_quiet_hours_is_refused(hours: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--quiet-hours {hours}: must be two "):
        QuietHours(hours)


def wait_for_line(server: Any, beginning: str, count: int = 1) -> str:
    """The `count`-th line that begins so."""
    for _ in range(600):
        found = [line for line in list(server.lines) if line.startswith(beginning)]
        if len(found) >= count:
            return found[count - 1].strip()
        clock.sleep(0.1)
    raise AssertionError(f"no line {beginning!r} in {list(server.lines)}")


@pytest.mark.slow
@pytest.mark.ours("the servers are processes of their own")
def test_a_server_pauses_and_comes_back_and_clients_go_on(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    stays = start_server(checkpoint, (0, NUM_BLOCKS), [], "--throughput", "1").wait_until_ready()
    options = "--throughput", "1e6", "--update-period", "2", "--identity-path", str(tmp_path / "server.id")
    pauses = start_server(checkpoint, (0, NUM_BLOCKS), [stays.maddr], *options).wait_until_ready()
    tokens = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    load: Any = AutoDistributedModelForCausalLM.from_pretrained
    model = load(checkpoint, tuning_mode="ptune", pre_seq_len=2, initial_peers=[stays.maddr], dht_prefix=PREFIX)
    try:
        expected = model(input_ids=tokens, labels=tokens).loss.item()
        pauses.signal(signal.SIGUSR1)
        assert wait_for_line(pauses, "paused") == "paused until SIGUSR2"
        assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(expected, rel=1e-5)
        assert [span.peer_id for span in remote_blocks(model).route()] == [stays.maddr.rsplit("/", 1)[1]]
        pauses.signal(signal.SIGUSR2)
        wait_for_line(pauses, "ready", count=2)
        peers = {line.split("/p2p/")[1] for line in pauses.lines if line.startswith("multiaddress")}
        assert len(peers) == 1, "it has come back as itself"
        stays.signal(signal.SIGUSR1)
        wait_for_line(stays, "paused")
        pauses.signal(signal.SIGINT)
        assert pauses.wait(30) == 0
        stays.signal(signal.SIGINT)
        assert stays.wait(30) == 0, "a paused server ends like any other"
    finally:
        model.close()
        pauses.stop()
        stays.stop()


@pytest.mark.slow
@pytest.mark.ours("the servers are processes of their own")
def test_a_server_keeps_quiet_hours(tiny_checkpoint) -> None:
    checkpoint = tiny_checkpoint("llama")
    first = start_server(checkpoint, (0, 2)).wait_until_ready()
    end = datetime.now().replace(microsecond=0) + timedelta(seconds=20)
    hours = f"{end - timedelta(hours=1):%H:%M:%S}-{end:%H:%M:%S}"
    second = start_server(checkpoint, (2, NUM_BLOCKS), [first.maddr], "--quiet-hours", hours)
    try:
        second.wait_until_ready()
        assert datetime.now() > end
        assert second.lines[0].strip() == f"paused until {end:%H:%M:%S}".removesuffix(":00")
    finally:
        second.stop()
        first.stop()


def test_the_first_server_of_a_swarm_has_no_quiet_hours(tiny_checkpoint) -> None:
    server = start_server(tiny_checkpoint("llama"), (0, 2), [], "--quiet-hours", "09:00-17:00")
    assert server.wait(60) == 1
    (error,) = [line for line in server.lines if line.startswith("error: ")]
    assert "--quiet-hours needs --initial-peers" in error
