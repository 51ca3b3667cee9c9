"""How servers join a Petals swarm, and leave it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

import pytest
import torch
from hivemind.proto import dht_pb2

from petals_lightning.protocol.messages import STREAM_METHOD
from petals_lightning.protocol.petals.calls import PetalsForward
from petals_lightning.protocol.petals.methods import ReachabilityProtocol
from petals_lightning.protocol.records import ServerState
from petals_lightning.protocol.uids import MODELS_KEY
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.streams import open_stream
from tests.helpers.families import HIDDEN, NUM_BLOCKS
from tests.petals.calls import PetalsCaller, peer_id, step
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX, InProcessSwarm


@pytest.mark.slow
def test_a_peer_is_told_whether_it_and_others_are_reached(swarm, client):
    def check(target) -> bool:
        async def call():
            stub = ReachabilityProtocol.get_stub(client.p2p, swarm.servers[0].node.peer_id)
            return await stub.rpc_check(
                dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=target.to_bytes())), timeout=20
            )

        return client.run(call()).available

    assert check(swarm.servers[0].node.peer_id)
    assert check(swarm.servers[1].node.peer_id)
    assert not check(client.peer_id)  # it answers no such question


@pytest.mark.slow
def test_records_of_petals_only_servers_look_like_petals(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 2), (2, 4)], servers="mixed")
    node = swarm.servers[0].node
    ours, theirs = (
        next(iter(node.run(node.dht.get(f"{PREFIX}.{block}", latest=True)).value.values())).value for block in (0, 3)
    )
    assert "lightning" in ours[2]
    state, throughput, extra = theirs
    assert (state, throughput > 0) == (int(ServerState.ONLINE), True)
    assert (extra["start_block"], extra["end_block"], extra["torch_dtype"], extra["quant_type"]) == (
        2, 4, "float32", "none",
    )  # fmt: skip
    assert set(extra) <= {
        "start_block", "end_block", "public_name", "version", "network_rps", "forward_rps", "inference_rps", "adapters",
        "torch_dtype", "quant_type", "using_relay", "cache_tokens_left", "next_pings",
    }  # fmt: skip
    assert extra["cache_tokens_left"] > 10_000
    models = node.run(node.dht.get(MODELS_KEY, latest=True)).value
    assert models[PREFIX].value == {"num_blocks": NUM_BLOCKS, "repository": None}


@pytest.mark.slow
def test_serve_petals_only(tiny_checkpoint):
    server = start_server(tiny_checkpoint("llama"), (0, NUM_BLOCKS), (), "--petals-only")
    try:
        server.wait_until_ready()
        with closing(SwarmNode([server.maddr], host_maddrs=(), client_mode=True).start()) as node:
            (found,) = node.run(SwarmDirectory(node).servers(PREFIX, 1))
            assert found[server.peer_id].stream_version is None
            caller, hidden = PetalsCaller(node, server.peer_id), torch.randn(1, 2, HIDDEN)
            assert caller.forward(PetalsForward(PREFIX, 0, NUM_BLOCKS, hidden)).shape == hidden.shape
            with pytest.raises(ConnectionError):
                node.run(open_stream(node.p2p, server.peer_id, STREAM_METHOD))
    finally:
        server.stop()


@pytest.mark.slow
def test_private_models_are_served_and_not_listed(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)], prefix="_secret")
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        assert node.run(SwarmDirectory(node).models()) == []
        caller, hidden = PetalsCaller(node, peer_id(swarm.servers[0])), torch.randn(1, 2, HIDDEN)
        assert caller.forward(PetalsForward("_secret", 0, 1, hidden)).shape == hidden.shape


@pytest.mark.slow
def test_a_server_that_leaves_ends_its_sessions(tiny_checkpoint, caplog):
    with InProcessSwarm(tiny_checkpoint("llama"), [(0, 1), (0, NUM_BLOCKS)]) as swarm:
        leaving = swarm.servers[1]
        opening = step(torch.ones(1, 1, HIDDEN), max_length=4).to_parts().to_request().SerializeToString()
        with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:

            async def open_session() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                name = "TransformerConnectionHandler.rpc_inference"
                _, reader, writer = await node.p2p.call_binary_stream_handler(leaving.node.peer_id, name)
                writer.write(b"\0" + len(opening).to_bytes(8, "big") + opening)
                assert await asyncio.wait_for(reader.readexactly(9), 10)
                return reader, writer

            reader, writer = node.run(open_session())
            resources = leaving.resources
            assert len(resources.caches) == 1
            leaving.stop(timeout=3)
            rest = node.run(asyncio.wait_for(reader.read(), 10))  # to the end of the stream
            assert len(rest) < 1000
            node.loop.call_soon_threadsafe(writer.close)
            assert not len(resources.caches)
            assert not resources.quotas.clients
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
