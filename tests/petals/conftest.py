"""A swarm whose Petals methods are called."""

from __future__ import annotations

import asyncio
from contextlib import closing

import pytest

from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import NUM_BLOCKS
from tests.petals.calls import SPLIT, PetalsCaller, peer_id
from tools.testing.swarms import InProcessSwarm

LIMITS = ServerLimits(cache_bytes=1 << 20, max_batch_tokens=512, max_message_bytes=1 << 20, max_client_bytes=4 << 20)


@pytest.fixture(scope="module")
def swarm(tiny_checkpoint):
    with InProcessSwarm(
        tiny_checkpoint("llama"), [(0, NUM_BLOCKS), (0, SPLIT), (SPLIT, NUM_BLOCKS)], limits=LIMITS
    ) as s:
        yield s


@pytest.fixture(scope="module")
def client(swarm):
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        yield node


@pytest.fixture
def callers(swarm, client):
    """One for each server: of all blocks, of the first and of the last ones."""
    yield [PetalsCaller(client, peer_id(server)) for server in swarm.servers]
    for server in swarm.servers:
        resources = server.resources

        async def settled(resources=resources):
            while resources.open_requests or resources.quotas.clients or len(resources.caches):
                await asyncio.sleep(0.01)

        server.node.run(asyncio.wait_for(settled(), 10))
        assert resources.quotas.num_bytes == 0
