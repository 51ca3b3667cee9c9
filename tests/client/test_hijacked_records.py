"""Records that somebody else stores under a server's id, or over all of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import torch
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.hf import Checkpoint
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.protocol.uids import block_uid
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode
from petals_lightning.swarm.record_keeping import MAX_LIFETIME
from tests.families import NUM_BLOCKS
from tests.swarms import LOOPBACK, PREFIX, InProcessSwarm

IDS = torch.tensor([[5, 6, 7, 8]])
TEN_YEARS = 10 * 365 * 86400.0


def hijack(swarm: InProcessSwarm, value: Any, lifetime: float, *, plain: bool = False) -> list[bool]:
    """A stranger stores `value` under the id of every server, or instead of all records; which keys it got."""
    peers = [server.node.peer_id.to_base58() for server in swarm.servers]
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        keys = [block_uid(PREFIX, block) for block in range(NUM_BLOCKS)]
        return [
            stranger.run(stranger.dht.store(key, value, get_dht_time() + lifetime, subkey=subkey, exclude_self=True))
            for subkey in ([None] if plain else peers)
            for key in keys
        ]


def record_of(swarm: InProcessSwarm, **changes: Any) -> Any:
    record = swarm.servers[0]._record
    assert record is not None
    return ServerRecord(**{**vars(record), **changes}).to_value()


@pytest.mark.parametrize("lifetime", [TEN_YEARS, 2 * MAX_LIFETIME])
def test_records_that_never_end_are_not_taken(lifetime, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, NUM_BLOCKS)])
    assert not any(hijack(swarm, record_of(swarm, state=ServerState.OFFLINE), lifetime))
    assert not any(hijack(swarm, "nothing", lifetime, plain=True))
    assert not any(hijack(swarm, "nothing", 60.0, plain=True))
    swarm.load(AutoDistributedModelForCausalLM)(IDS)


@pytest.mark.parametrize(
    "changes", [{"state": ServerState.OFFLINE}, {"hidden_size": 7}, {"fingerprint": "other"}], ids=str
)
def test_a_server_whose_stream_is_open_is_not_dropped_for_a_record(changes, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, NUM_BLOCKS)])
    model = swarm.load(
        AutoDistributedModelForCausalLM, client_config=ClientConfig(refresh_period=0.3, recovery_timeout=3)
    )
    with torch.no_grad():
        expected = model(IDS).logits
        assert all(hijack(swarm, record_of(swarm, **changes), MAX_LIFETIME / 2))
        view = remote_blocks(model)._swarm.view
        view.node.run(view.refresh())
        assert torch.equal(model(IDS).logits, expected)
    assert remote_blocks(model).stats.retries == 0


def test_a_hijacked_record_heals_with_an_announcement(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    (server,) = swarm.servers
    assert all(hijack(swarm, record_of(swarm, state=ServerState.OFFLINE), MAX_LIFETIME / 2))

    async def announce() -> None:  # as it does once in each period
        server._update_period = 0.1
        with suppress(TimeoutError):
            await asyncio.wait_for(server._announce_forever(PREFIX, NUM_BLOCKS, server._record), 2.0)

    server.node.run(announce())
    swarm.load(AutoDistributedModelForCausalLM, client_config=ClientConfig(recovery_timeout=1))(IDS)


def test_an_update_period_whose_records_nobody_takes_is_refused(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    with pytest.raises(ConfigurationError, match=r"update_period=3600: .* use at most 1800"):
        Server(checkpoint, SwarmNode(host_maddrs=LOOPBACK), update_period=3600.0)
