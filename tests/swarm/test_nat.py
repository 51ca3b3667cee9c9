"""Servers behind a router: found out by other peers, and used through a relay.

Each machine is a network namespace of this one. Two of them are behind routers of their own, which translate addresses
(NAT) and let no calls in; only the machine between these has a route to both.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hivemind.utils.multiaddr import Multiaddr
from transformers import AutoModelForCausalLM

from petals_lightning.errors import ConfigurationError
from petals_lightning.strategies.server_process import ServerProcess
from petals_lightning.swarm import SwarmNode, relays
from petals_lightning.swarm.reachability import can_be_called
from petals_lightning.swarm.relays import carried_bytes, limit_in
from tools.testing.swarms import LOOPBACK, PREFIX

ROOT = Path(__file__).resolve().parents[2]
RELAY = "44.1.0.1"  # looks public, and is only in the namespaces


def sh(commands: str, *before: str) -> None:
    """Runs a script by bash, itself run by a command."""
    arguments = [*before, "bash", "-euc", textwrap.dedent(commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{commands}: {done.stderr}"


class Machines:
    """`relay` in the middle; `a` and `b` behind the routers `nat_a` and `nat_b`. Ends everything it has started."""

    names = ("relay", "nat_a", "nat_b", "a", "b")

    def __init__(self) -> None:
        self._stack, self._tag = ExitStack(), f"pl{os.getpid()}"

    def __enter__(self) -> Machines:
        with self._stack:  # ends what was made if anything fails
            self._make()
            self._stack = self._stack.pop_all()
        return self

    def _make(self) -> None:
        for name in self.names:
            sh(f"ip netns add {self._tag}{name}")
            self._stack.callback(sh, f"ip netns delete {self._tag}{name}")
            self.do(name, "ip link set lo up")
        for number, side in enumerate("ab", 1):
            router = f"nat_{side}"
            self._link("relay", f"44.{number}.0.1", router, f"44.{number}.0.2")
            self._link(router, f"10.{number}.0.1", side, f"10.{number}.0.2")
            self.do(side, f"ip route add default via 10.{number}.0.1")
            self.do(router, f"ip route add default via 44.{number}.0.1")
            self.do(router, "echo 1 > /proc/sys/net/ipv4/ip_forward")
            self.do(
                router,
                f"""
                nft add table ip nat
                nft add chain ip nat post '{{ type nat hook postrouting priority 100; }}'
                nft add rule ip nat post ip saddr 10.{number}.0.0/24 oifname relay masquerade
                nft add chain ip nat guard '{{ type filter hook forward priority 0; policy drop; }}'
                nft add rule ip nat guard ct state established,related accept
                nft add rule ip nat guard ip saddr 10.{number}.0.0/24 accept
                """,
            )

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _link(self, one: str, one_address: str, other: str, other_address: str) -> None:
        sh(
            f"""
            ip link add name {other} netns {self._tag}{one} type veth peer name {one} netns {self._tag}{other}
            ip -n {self._tag}{one} address add {one_address}/24 dev {other}
            ip -n {self._tag}{other} address add {other_address}/24 dev {one}
            ip -n {self._tag}{one} link set dev {other} up
            ip -n {self._tag}{other} link set dev {one} up
            """
        )

    def do(self, name: str, commands: str) -> None:
        sh(commands, "ip", "netns", "exec", f"{self._tag}{name}")

    def popen(self, name: str, *command: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"{self._tag}{name}", sys.executable, *command],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def serve(self, name: str, *arguments: str) -> ServerProcess:
        process = self.popen(name, "-m", "petals_lightning.cli.main", *arguments, stderr=subprocess.STDOUT)
        server = ServerProcess(process, f"{arguments[0]} on {name}").start()
        self._stack.callback(server.stop)
        return server.wait_until_ready()


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    for command in ("ip", "nft"):
        if shutil.which(command) is None:
            pytest.skip(f"needs the command {command} (Debian: apt-get install iproute2 nftables)")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this kernel or container makes no network namespaces")
    with Machines() as made:
        yield made


CLIENT = """
import json, sys, torch
from petals_lightning import SwarmNode
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.swarm import SwarmDirectory

checkpoint, maddr, prefix = sys.argv[1:]
node = SwarmNode([maddr], host_maddrs=(), client_mode=True).start()
(record,) = node.run(SwarmDirectory(node).signed_servers(prefix)).values()
model = AutoDistributedModelForCausalLM.from_pretrained(checkpoint, node=node, dht_prefix=prefix)
stats = remote_blocks(model).stats
ids = torch.arange(4 * 64).reshape(4, 64) % 50
with torch.no_grad():
    while stats.bytes_sent < 1 << 20:
        logits = model(ids).logits
tokens = model.generate(ids[:1, :4], max_new_tokens=5, do_sample=False)
found = {"tokens": tokens.tolist(), "retries": stats.retries, "using_relay": record.using_relay}
print(json.dumps({"logits": logits[0, -1].tolist(), **found}))
remote_blocks(model).close()
node.close()
"""


@pytest.mark.slow
@pytest.mark.ours("the servers are processes of their own")
def test_a_server_behind_nat_is_used_by_a_client_behind_nat(machines, tiny_checkpoint, tmp_path):
    checkpoint = str(tiny_checkpoint("llama"))
    identity = ["--identity-path", str(tmp_path / "relay.id")]
    relay = machines.serve("relay", "bootstrap", "--host-maddrs", "/ip4/0.0.0.0/tcp/31337", *identity)
    maddr = f"/ip4/{RELAY}/tcp/31337/p2p/{relay.peer_id}"
    options = ["--dht-prefix", PREFIX, "--threads", "1"]
    server = machines.serve("a", "serve", checkpoint, "--initial-peers", maddr, *options)
    assert "other peers cannot call this one: their calls pass a relay, which is slower\n" in server.lines
    assert any("/p2p-circuit" in line for line in server.lines if line.startswith("multiaddress: "))

    client = machines.popen("b", "-c", CLIENT, checkpoint, f"/ip4/44.2.0.1/tcp/31337/p2p/{relay.peer_id}", PREFIX)
    output, errors = client.communicate(timeout=120)
    assert client.returncode == 0, errors
    answer, local = json.loads(output), AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(4 * 64).reshape(4, 64) % 50
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(answer["logits"]), local(ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert answer["tokens"] == local.generate(ids[:1, :4], max_new_tokens=5, do_sample=False).tolist()
    assert answer["retries"] == 0  # no connection was cut, though each has carried more than 128 KiB
    assert answer["using_relay"] is True


@pytest.mark.slow
def test_a_relay_never_has_the_small_limit_of_libp2p():
    """The daemon by itself, on two idle processors, had it in 54 of 60 starts."""
    everywhere = ("/ip4/0.0.0.0/tcp/0",)
    for _ in range(6):
        with ExitStack() as stack:
            relay = stack.enter_context(SwarmNode(host_maddrs=everywhere).start())
            client = stack.enter_context(SwarmNode(relay.visible_maddrs(), host_maddrs=(), client_mode=True).start())
            assert client.run(carried_bytes(client.p2p, relay.peer_id)) == 1 << 32


@pytest.mark.parametrize(
    ("answer", "limit"),
    [
        ("08011a022a00220908880e1080808080102864", 1 << 32),
        ("08011a022a0022060878108080082864", 1 << 17),
        ("0801286428c801", math.inf),
        ("", math.inf),
    ],
    ids=["large", "small", "refused", "empty"],
)
def test_a_limit_is_read_from_a_relays_answer(answer, limit):
    assert limit_in(bytes.fromhex(answer)) == limit


@pytest.mark.parametrize("answer", ["ff", "2205", "2005", "22021200", "220408ffffff", "0b"])
def test_an_answer_of_a_stranger_that_is_none_is_an_error_of_the_connection(answer):
    with pytest.raises(ConnectionResetError, match="the relay's"):
        limit_in(bytes.fromhex(answer))


@pytest.mark.slow
def test_a_relay_with_a_small_limit_is_started_again_and_told_of(monkeypatch, caplog):
    limits = iter([1 << 17, 1 << 32])
    asked: list[object] = []

    async def answer(p2p, relay):
        asked.append(relay)
        return next(limits)

    monkeypatch.setattr(relays, "carried_bytes", answer)
    with SwarmNode(host_maddrs=("/ip4/0.0.0.0/tcp/0",)).start() as node:
        assert len(set(asked)) == len(asked) == 2
        assert node.peer_id == asked[1]
    limits = iter([1 << 17])
    asyncio.run(relays.warn_of_short_relays(None, [node.peer_id]))
    assert f"the relay {node.peer_id} cuts each connection after 128 KiB" in caplog.text


@pytest.mark.slow
def test_peers_say_whether_they_can_call_another():
    with ExitStack() as stack:
        first = stack.enter_context(SwarmNode(host_maddrs=LOOPBACK).start())
        other = stack.enter_context(SwarmNode(first.visible_maddrs(), host_maddrs=LOOPBACK).start())

        def ask(maddrs: list[str]) -> bool | None:
            return other.run(can_be_called(other.p2p, [first.peer_id], map(Multiaddr, maddrs)))

        assert ask(other.visible_maddrs()) is True
        with socket.socket() as silent:  # listens, and is no peer
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            assert ask([f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"]) is False
        assert ask(["/ip4/127.0.0.1/tcp/1"]) is False
        assert ask([]) is None, "no address to try"
        client = stack.enter_context(SwarmNode(first.visible_maddrs(), host_maddrs=(), client_mode=True).start())
        assert other.run(can_be_called(other.p2p, [client.peer_id], [])) is None


def test_an_unknown_choice_is_one_line():
    with pytest.raises(ConfigurationError, match="relay is 'maybe': choose one of auto, always, never"):
        SwarmNode(relay="maybe")
