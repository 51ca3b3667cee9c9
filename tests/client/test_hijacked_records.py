"""Records that somebody else stores under a server's id, or over all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hivemind.dht.routing import DHTID
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError, NoServersError
from petals_lightning.hf import Checkpoint
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.protocol.identity import Identity
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.protocol.signed_records import SUBKEY_PREFIX, SignedRecord, signed_key
from petals_lightning.protocol.uids import block_uid
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.record_keeping import MAX_LIFETIME
from tests.helpers.families import NUM_BLOCKS
from tools.testing.swarms import LOOPBACK, PREFIX, InProcessSwarm

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8]])
TEN_YEARS = 10 * 365 * 86400.0
TOKEN = "a token of more than sixteen characters"


def hijack(swarm: InProcessSwarm, value: Any, lifetime: float, *, plain: bool = False) -> list[bool]:
    """A stranger stores `value` under the id of every server, or instead of all records; which keys it got."""
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        keys = [block_uid(PREFIX, block) for block in range(NUM_BLOCKS)]
        return [
            stranger.run(stranger.dht.store(key, value, get_dht_time() + lifetime, subkey=subkey, exclude_self=True))
            for subkey in ([None] if plain else swarm.by_id)
            for key in keys
        ]


def record_of(swarm: InProcessSwarm, **changes: Any) -> ServerRecord:
    return replace(swarm.servers[0].record, **changes)


@pytest.mark.parametrize("lifetime", [TEN_YEARS, 2 * MAX_LIFETIME])
def test_records_that_never_end_are_not_taken(lifetime, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, NUM_BLOCKS)])
    assert not any(hijack(swarm, record_of(swarm, state=ServerState.OFFLINE).to_value(), lifetime))
    assert not any(hijack(swarm, "nothing", lifetime, plain=True))
    assert not any(hijack(swarm, "nothing", 60.0, plain=True))
    swarm.load(AutoDistributedModelForCausalLM)(IDS)


@pytest.mark.parametrize(
    "changes", [{"state": ServerState.OFFLINE}, {"hidden_size": 7}, {"fingerprint": "other"}], ids=str
)
def test_an_unsigned_record_hides_no_server(changes, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, NUM_BLOCKS)])
    running = swarm.load(AutoDistributedModelForCausalLM)
    with torch.no_grad():
        expected = running(IDS).logits
        assert all(hijack(swarm, record_of(swarm, **changes).to_value(), MAX_LIFETIME / 2))
        servers = remote_blocks(running)._swarm.servers
        servers.node.run(servers.refresh())
        newcomer = swarm.load(AutoDistributedModelForCausalLM, client_config=ClientConfig(recovery_timeout=1))
        for model in (running, newcomer):
            assert torch.equal(model(IDS).logits, expected)
            assert remote_blocks(model).stats.retries == 0


def test_petals_clients_find_a_hijacked_server_after_its_next_announcement(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    (server,) = swarm.servers
    peer, key = server.node.peer_id.to_base58(), block_uid(PREFIX, 0)
    assert all(hijack(swarm, record_of(swarm, state=ServerState.OFFLINE).to_value(), MAX_LIFETIME / 2))

    async def announce() -> None:  # as it does once in each period
        server._announcer._period = 0.1
        with suppress(TimeoutError):
            await asyncio.wait_for(server._announcer.announce_forever(), 2.0)

    def state() -> int:
        return int(server.node.run(server.node.dht.get(key, latest=True)).value[peer].value[0])

    assert state() == ServerState.OFFLINE
    server.node.run(announce())
    assert state() == ServerState.ONLINE


def forged(swarm: InProcessSwarm, expires: float) -> dict[str, Any]:
    """Values under a server's id that are not its own words, and when they say that they end."""
    victim, stranger = swarm.servers[0].node, Identity.new()
    offline = record_of(swarm, state=ServerState.OFFLINE)
    good = SignedRecord.sign(record_of(swarm), PREFIX, expires - 30, victim.identity, None)
    elsewhere = SignedRecord.sign(offline, "another-model", expires, victim.identity, None)
    payload, key, signature, code = SignedRecord.sign(offline, PREFIX, expires, stranger, None)
    return {
        "of a stranger": (payload, key, signature, code),
        "with the victim's key": (payload, victim.identity.public_key, signature, code),
        "with another signature": (payload, victim.identity.public_key, good[2], code),
        "told to last longer": good,
        "of another model": elsewhere,
        "not signed": offline.to_value(),
        "nothing": None,
    }


@pytest.mark.parametrize("kind", ["kept by honest peers", "told by a liar"])
def test_nobody_signs_for_a_server(kind, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    (server,) = swarm.servers
    peer, key = server.node.peer_id.to_base58(), signed_key(PREFIX)
    subkey, expires = SUBKEY_PREFIX + peer, get_dht_time() + 600
    with ExitStack() as stack:
        stranger = stack.enter_context(SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start())
        reader = stack.enter_context(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start())
        for value in forged(swarm, expires).values():
            if kind == "kept by honest peers":
                store = stranger.dht.store(key, value, expires, subkey=subkey, exclude_self=True)
                assert not stranger.run(store), value
            else:  # it answers whoever asks it
                storage, raw = stranger.dht.protocol.storage, MSGPackSerializer.dumps(value)
                storage.clear()
                assert storage.store_subkey(DHTID.generate(source=key), subkey, raw, expires)
            found = reader.run(SwarmDirectory(reader).signed_servers(PREFIX))
            assert {peer: record.state for peer, record in found.items()} == {peer: ServerState.ONLINE}, value


def test_an_earlier_announcement_that_is_stored_again_ends_nothing(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    (server,) = swarm.servers
    node, peer = server.node, server.node.peer_id.to_base58()
    earlier = get_dht_time() + 1.5
    value = SignedRecord.sign(record_of(swarm), PREFIX, earlier, node.identity, None)
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        key, subkey = signed_key(PREFIX), SUBKEY_PREFIX + peer
        assert not stranger.run(stranger.dht.store(key, value, earlier, subkey=subkey, exclude_self=True))

        async def later() -> None:
            await asyncio.sleep(max(0.0, earlier - get_dht_time()) + 0.2)

        stranger.run(later())
        assert peer in node.run(SwarmDirectory(node).signed_servers(PREFIX))


def test_with_a_token_only_servers_that_know_it_are_seen(tiny_checkpoint, start_swarm: Callable[..., InProcessSwarm]):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)], rules=AccessRules(token=TOKEN))
    (server,) = swarm.servers
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        claims = record_of(swarm, tokens_per_second=1e12)
        assert stranger.run(SwarmDirectory(stranger, "another token of sixteen").announce(PREFIX, claims, 60))
        ours, everybody = (
            set(stranger.run(SwarmDirectory(stranger, token).signed_servers(PREFIX))) for token in (TOKEN, None)
        )
        assert ours == {server.node.peer_id.to_base58()}
        assert everybody == ours | {stranger.peer_id.to_base58()}
        config = ClientConfig(swarm_token=TOKEN)
        assert swarm.load(AutoDistributedModelForCausalLM, client_config=config)(IDS).logits.isfinite().all()


def test_an_unsigned_record_makes_nobody_a_server_of_ours(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2)])
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        value, expires = record_of(swarm, start=2, end=NUM_BLOCKS).to_value(), get_dht_time() + 60
        for block in range(2, NUM_BLOCKS):
            peer = stranger.peer_id.to_base58()
            assert stranger.run(stranger.dht.store(block_uid(PREFIX, block), value, expires, subkey=peer))
        (record,) = stranger.run(SwarmDirectory(stranger).servers(PREFIX, NUM_BLOCKS))[2].values()
        assert (record.stream_version, record.hidden_size, record.state) == (None, None, ServerState.ONLINE)
        with pytest.raises(NoServersError):
            swarm.load(AutoDistributedModelForCausalLM, client_config=ClientConfig(recovery_timeout=1))


def test_an_update_period_whose_records_nobody_takes_is_refused(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint("llama"))
    with pytest.raises(ConfigurationError, match=r"update_period=3600: .* use at most 1800"):
        Server(checkpoint, SwarmNode(host_maddrs=LOOPBACK), config=ServerConfig(update_period=3600.0))
