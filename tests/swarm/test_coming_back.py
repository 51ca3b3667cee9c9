"""A swarm whose peers were away finds together again."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.strategies.server_process import ServerProcess
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.node import MEETING_PERIOD
from tools.testing.servers import start_server
from tools.testing.swarms import LOOPBACK, PREFIX

IDS = torch.tensor([[5, 6, 7, 8]])


def address(tmp_path: Path) -> list[str]:
    """Options that give a peer the same address and id each time that it starts."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    return ["--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}", "--identity-path", str(tmp_path / f"{port}.id")]


def killed(server: ServerProcess) -> None:
    server.signal(signal.SIGKILL)
    server.wait(10)
    server.stop()


@pytest.mark.slow
def test_a_client_that_waits_finds_the_only_server_when_it_is_back(tiny_checkpoint, tmp_path) -> None:
    checkpoint, options = tiny_checkpoint("llama"), address(tmp_path)
    server = start_server(checkpoint, None, [], *options).wait_until_ready()
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(checkpoint), initial_peers=[server.maddr], dht_prefix=PREFIX, recovery_timeout=60
    )
    again = []
    try:
        with torch.no_grad():
            expected = model(IDS).logits
        killed(server)

        def come_back() -> None:
            time.sleep(1)
            again.append(start_server(checkpoint, None, [], *options).wait_until_ready())

        thread = threading.Thread(target=come_back)
        thread.start()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
        thread.join()
    finally:
        remote_blocks(model).close()
        for each in again:
            each.stop()


@pytest.mark.slow
def test_a_peer_that_is_joined_by_is_not_alone_after_its_restart(tiny_checkpoint, tmp_path) -> None:
    checkpoint, identity = tiny_checkpoint("llama"), address(tmp_path)
    maddrs, path = [identity[1]], identity[3]
    bootstrap = SwarmNode(host_maddrs=maddrs, identity_path=path).start()
    (peer,) = bootstrap.visible_maddrs()
    server = start_server(checkpoint, None, [peer]).wait_until_ready()
    try:
        bootstrap.close()
        bootstrap = SwarmNode(host_maddrs=maddrs, identity_path=path).start()
        deadline = time.monotonic() + 3 * MEETING_PERIOD
        with SwarmNode([peer], host_maddrs=(), client_mode=True).start() as newcomer:
            directory = SwarmDirectory(newcomer)
            while not all(held := newcomer.run(directory.servers(PREFIX, 4))) and time.monotonic() < deadline:
                time.sleep(0.5)
            assert [list(servers) for servers in held] == [[server.peer_id]] * 4
    finally:
        server.stop()
        bootstrap.close()


def test_halves_of_a_swarm_that_lost_each_other_find_together() -> None:
    nodes = [SwarmNode(host_maddrs=LOOPBACK).start()]
    try:
        for _ in range(2):
            nodes.append(SwarmNode(nodes[0].visible_maddrs(), host_maddrs=LOOPBACK).start())
        first, second, third = nodes
        second.run(second.meet_again())  # it remembers whom it knows
        for one, other in ((second, third), (second, first), (third, first), (third, second)):
            table = one.dht.protocol.routing_table
            if (uid := table.get(peer_id=other.peer_id)) is not None:
                del table[uid]
        assert not second.dht.protocol.routing_table.peer_id_to_uid
        second.run(second.meet_again())
        known = second.dht.protocol.routing_table.peer_id_to_uid
        assert first.peer_id in known
        assert second.peer_id in first.dht.protocol.routing_table.peer_id_to_uid
    finally:
        for node in reversed(nodes):
            node.close()
