"""Machines whose clocks differ: hivemind takes no more than 3 seconds. A real peer's clock is 100 seconds ahead."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from petals_lightning.cli.app import app
from petals_lightning.errors import SwarmConnectionError, SwarmError
from petals_lightning.models import AutoDistributedModelForCausalLM
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.swarm import SwarmDirectory, SwarmNode, public
from tests.helpers.clocks import main_with_a_wrong_clock
from tools.testing.forks import run_command
from tools.testing.servers import start_server
from tools.testing.swarms import LOOPBACK, PREFIX

BEHIND = re.compile(
    r"cannot join the swarm: this machine's clock is (99\.\d|100\.\d) s behind those of initial_peers \[/ip4/\S+\]\. "
    r"Check that both machines' clocks agree within 3 s: set the wrong one, e\.g\. by `timedatectl set-ntp true`"
)
RECORD = ServerRecord(ServerState.ONLINE, 3.0, 0, 2, hidden_size=8, stream_version=1)


@pytest.fixture(scope="module")
def ahead(text_model: Path) -> Iterator[str]:
    """The address of a server whose clock is ahead."""
    server = start_server(text_model, (0, 4), program=main_with_a_wrong_clock)
    try:
        yield server.wait_until_ready().maddr
    finally:
        server.stop()


@pytest.fixture
def right() -> Iterator[SwarmNode]:
    with SwarmNode(host_maddrs=LOOPBACK).start() as node:
        yield node


@pytest.mark.slow
def test_a_server_whose_own_clock_is_wrong_says_so_and_ends(text_model: Path, right: SwarmNode) -> None:
    server = start_server(text_model, (0, 4), right.visible_maddrs(), program=main_with_a_wrong_clock)
    try:
        with pytest.raises(SwarmError, match=r"ended while starting \(exit code 1\)"):
            server.wait_until_ready()
        assert server.wait(20) == 1
        (said,) = [line for line in server.lines if " INFO " not in line]
        assert re.match(r"error: .* clock is (99\.\d|100\.\d) s ahead of .* clocks agree within 3 s", said)
    finally:
        server.stop()


@pytest.mark.slow
def test_serve_and_bootstrap_say_it_in_one_line(text_model: Path, ahead: str) -> None:
    server = start_server(text_model, (0, 4), [ahead])
    identity = str(text_model / "peer.id")
    bootstrap = run_command(
        "bootstrap", "--initial-peers", ahead, "--host-maddrs", *LOOPBACK, "--identity-path", identity
    )
    assert bootstrap.returncode == 1
    assert BEHIND.fullmatch(bootstrap.stderr.strip().removeprefix("error: ")), bootstrap.stderr
    try:
        with pytest.raises(SwarmError, match=r"ended while starting \(exit code 1\)"):
            server.wait_until_ready()
        assert server.wait(20) == 1
        (said,) = [line for line in server.lines if " INFO " not in line]
        assert BEHIND.fullmatch(said.strip().removeprefix("error: "))
    finally:
        server.stop()


@pytest.mark.parametrize("command", ["status", "generate {model} Hello", "chat {model}"])
def test_other_commands_say_it(command: str, text_model: Path, ahead: str) -> None:
    began = time.monotonic()
    words = [*command.format(model=text_model).split(), "--initial-peers", ahead]
    words += ["--dht-prefix", PREFIX] if command != "status" else []
    result = CliRunner().invoke(app, words, input="Hello\n")
    assert isinstance(result.exception, SwarmConnectionError)
    assert BEHIND.fullmatch(str(result.exception))
    assert time.monotonic() - began < 20


def test_a_model_says_it(text_model: Path, ahead: str) -> None:
    with pytest.raises(SwarmConnectionError, match=BEHIND):
        AutoDistributedModelForCausalLM.from_pretrained(text_model, initial_peers=[ahead], dht_prefix=PREFIX)


def test_the_public_network_is_called_by_its_name(ahead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "PUBLIC_INITIAL_PEERS", (ahead,))
    with pytest.raises(SwarmConnectionError, match="cannot join the public Petals network: this machine's clock is"):
        SwarmNode([ahead], host_maddrs=(), client_mode=True).start()


@pytest.mark.parametrize("first", ["wrong", "right"])
@pytest.mark.parametrize("client_mode", [False, True])
def test_one_peer_with_a_right_clock_is_enough(first: str, client_mode: bool, ahead: str, right: SwarmNode) -> None:
    peer = right.peer_id.to_base58()
    assert right.run(SwarmDirectory(right).announce("m", RECORD, 60))
    peers = [ahead, *right.visible_maddrs()] if first == "wrong" else [*right.visible_maddrs(), ahead]
    with SwarmNode(peers, host_maddrs=() if client_mode else LOOPBACK, client_mode=client_mode).start() as node:
        assert node.run(SwarmDirectory(node).servers("m", 2)) == [{peer: RECORD}] * 2
