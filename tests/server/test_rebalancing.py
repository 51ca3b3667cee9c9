"""Servers that move: six that die and join under a client, and a move in the middle of a conversation."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_lightning.hf import Checkpoint
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.protocol.records import ServerState
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.running_server import RunningServer
from petals_lightning.server.server import Server
from petals_lightning.strategies.server_process import ServerProcess
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from tests.helpers.families import NUM_BLOCKS
from tools.testing.servers import start_server
from tools.testing.swarms import LOOPBACK, PREFIX

IDS = torch.tensor([[5, 6, 7, 8]])
pytestmark = [pytest.mark.slow, pytest.mark.ours("it starts servers itself")]


class Servers:
    """Servers of a tiny Llama in this process, each of two blocks that it has chosen."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self.running: list[RunningServer] = []
        self.own: dict[int, Server] = {}

    def start(self, **options: Any) -> RunningServer:
        peers = self.running[0].node.visible_maddrs() if self.running else []
        options = {"num_blocks": 2, "throughput": 1.0, "update_period": 10.0} | options
        config = ServerConfig(dht_prefix=PREFIX, device="cpu", drain_timeout=1.0, **options)
        server = Server(Checkpoint(str(self.checkpoint)), SwarmNode(peers, host_maddrs=LOOPBACK), config=config)
        running = server.start()
        self.running.append(running)
        self.own[id(running)] = server
        return running

    def places(self) -> list[tuple[int, int]]:
        """Where those are that serve."""
        return sorted(
            (each.record.start or 0, each.record.end or 0)
            for each in self.running
            if each.serving is not None and each.record.state is ServerState.ONLINE
        )

    def load(self, **options: Any) -> Any:
        model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            str(self.checkpoint),
            initial_peers=self.running[0].node.visible_maddrs(),
            dht_prefix=PREFIX,
            refresh_period=1.0,
            **options,
        )
        return model


@pytest.fixture
def servers(tiny_checkpoint: Callable[[str], Path]) -> Iterator[Servers]:
    started = Servers(tiny_checkpoint("llama"))
    yield started
    for server in reversed(started.running):
        server.stop(timeout=1)


def test_servers_that_join_at_the_same_moment_choose_different_places(servers):
    servers.start(num_blocks=NUM_BLOCKS)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: servers.start(num_blocks=1), range(4)))
    assert servers.places() == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]


def test_six_servers_that_die_and_join_fill_holes_once(tiny_checkpoint):
    checkpoint = tiny_checkpoint("llama")
    started: list[ServerProcess] = []
    quick = {"--update-period": "4", "--balance-period": "2", "--drain-timeout": "1"}
    options = [word for pair in ({"--num-blocks": "2", "--throughput": "1"} | quick).items() for word in pair]

    def start() -> ServerProcess:
        peers = [started[0].maddr] if started else []
        started.append(start_server(checkpoint, None, peers, *options))
        return started[-1].wait_until_ready(time.monotonic() + 60)

    def places() -> list[tuple[int | None, int | None]]:
        found = node.run(SwarmDirectory(node).signed_servers(PREFIX)).values()
        return sorted((each.start, each.end) for each in found if each.state is ServerState.ONLINE)

    try:
        start()
        with SwarmNode([started[0].maddr], host_maddrs=LOOPBACK).start() as node:
            for _ in range(5):
                start()
            assert places() == [(0, 2)] * 3 + [(2, 4)] * 3, "each has joined where the swarm was thinnest"
            swarm: Any = {"initial_peers": [started[0].maddr], "dht_prefix": PREFIX, "refresh_period": 2.0}
            local = AutoModelForCausalLM.from_pretrained(checkpoint)
            expected = local.generate(IDS, max_new_tokens=6, do_sample=False)
            model = AutoDistributedModelForCausalLM.from_pretrained(str(checkpoint), recovery_timeout=120, **swarm)
            try:
                assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
                records = node.run(SwarmDirectory(node).signed_servers(PREFIX))
                for server in [each for each in started if records[each.peer_id].start == 2]:
                    server.signal(signal.SIGKILL)
                # The client waits for blocks that nobody holds until one of the three has moved there.
                assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
                assert places() == [(0, 2), (0, 2), (2, 4)], "one has filled the hole, and no second one"
                start()
                assert places() == [(0, 2), (0, 2), (2, 4), (2, 4)], "thinner than 0:2"
                time.sleep(12)  # longer than a server stays after a move
                assert places() == [(0, 2), (0, 2), (2, 4), (2, 4)], "nothing moves at rest"
                assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
            finally:
                remote_blocks(model).close()
    finally:
        for server in started:
            server.stop()


def test_a_conversation_goes_on_while_its_server_moves(servers):
    mover, _ = servers.start(balance_quality=0.0), servers.start(balance_quality=0.0)
    assert servers.places() == [(0, 2), (2, 4)]
    local = AutoModelForCausalLM.from_pretrained(servers.checkpoint)
    expected = local.generate(IDS, max_new_tokens=12, do_sample=False)
    model = servers.load()
    try:
        with model.inference_session(max_length=24) as session:
            model.generate(IDS, max_new_tokens=6, do_sample=False)
            assert session.peers[0] == mover.node.peer_id.to_base58()
            servers.start(num_blocks=NUM_BLOCKS)
            mover.node.run(servers.own[id(mover)]._move(mover, (2, 4)))
            assert servers.places() == [(0, 4), (2, 4), (2, 4)]
            model.generate(max_new_tokens=6, do_sample=False)
            assert torch.equal(session.tokens, expected)
            assert mover.node.peer_id.to_base58() not in session.peers
    finally:
        remote_blocks(model).close()


def test_a_server_whose_new_blocks_cannot_be_loaded_takes_its_old_ones(servers, monkeypatch):
    servers.start(num_blocks=NUM_BLOCKS)
    mover = servers.start(balance_quality=0.0)
    own = servers.own[id(mover)]
    load = own._loader.load

    def fails(start, end):
        if start:
            raise OSError("the disk is full")
        return load(start, end)

    monkeypatch.setattr(own._loader, "load", fails)
    mover.node.run(own._move(mover, (2, 4)))
    assert servers.places() == [(0, 2), (0, 4)]
    assert mover.is_alive
