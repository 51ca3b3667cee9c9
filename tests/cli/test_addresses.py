"""Options of multiaddresses as people type them. (A command that joins by several: tests/cli/test_chat.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import typer

from petals_lightning.cli.app import app
from petals_lightning.swarm import SwarmNode

A = "/ip4/10.0.0.1/tcp/31337/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
B = "/dns/peer.example.org/tcp/31337/p2p/QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5"
LISTEN = ["/ip4/0.0.0.0/tcp/31337", "/ip6/::/tcp/31337"]


def parsed(line: str) -> dict[str, Any]:
    """What a command would be called with."""
    name, *words = line.format(A=A, B=B, one=LISTEN[0], other=LISTEN[1]).split()
    command: Any = typer.main.get_command(app)
    with command.commands[name].make_context(name, words) as context:
        return context.params


@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("m --initial-peers {A} {B}", "m"),
        ("--initial-peers {A} {B} m", "m"),
        ("--initial-peers={A} {B} m", "m"),
        ("--initial-peers {A} m --initial-peers {B}", "m"),
        ("--initial-peers {A} {B} --dht-prefix p m", "m"),
        ("--initial-peers {A} --initial-peers {B} /ip4x/m", "/ip4x/m"),
        ("--initial-peers {A} {B} -- /ip4/m", "/ip4/m"),
    ],
)
def test_several_peers_and_the_model(command: str, words: str, model: str) -> None:
    found = parsed(f"{command} {words}")
    assert (list(found["initial_peers"]), found["model"]) == ([A, B], model)


@pytest.mark.parametrize("command", ["status", "bootstrap"])
@pytest.mark.parametrize("words", ["{A} {B}", "{A} --initial-peers {B}"])
def test_several_peers_without_a_model(command: str, words: str) -> None:
    assert list(parsed(f"{command} --initial-peers {words}")["initial_peers"]) == [A, B]


@pytest.mark.parametrize("command", ["serve m", "bootstrap"])
def test_several_addresses_to_listen_on_and_to_announce(command: str) -> None:
    found = parsed(
        f"{command} --host-maddrs {{one}} {{other}} --announce-maddrs {{other}} {{one}} --initial-peers {{A}}"
    )
    options = [list(found[name]) for name in ("host_maddrs", "announce_maddrs", "initial_peers")]
    assert options == [LISTEN, LISTEN[::-1], [A]]


def test_a_text_that_looks_like_an_address_follows_two_dashes() -> None:
    found = parsed("generate --initial-peers {A} -- m {B}")
    assert (list(found["initial_peers"]), found["model"], found["text"]) == ([A], "m", B)


def test_an_option_without_an_address_is_an_error() -> None:
    with pytest.raises(Exception, match="requires an argument"):
        parsed("status --initial-peers")


@pytest.mark.parametrize("given", [f"{A},{B}", f" {A}, {B} ", f"{A}\n{B}", [A, B], [f"{A},{B}"], (f" {A}", B)])
def test_several_peers_as_one_text(given: Any) -> None:
    assert SwarmNode(given).initial_peers == [A, B]
