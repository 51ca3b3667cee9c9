"""What any peer could break in hivemind alone: calls that are given up, records that cannot be read."""

from __future__ import annotations

import asyncio
from contextlib import closing
from uuid import uuid4

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.p2p.p2p_daemon_bindings.utils import write_unsigned_varint
from hivemind.proto import p2pd_pb2
from hivemind.proto.dht_pb2 import PingRequest, PingResponse
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from tools.testing.swarms import LOOPBACK


def test_the_answer_to_a_call_just_given_up_is_passed_over():
    with closing(SwarmNode(host_maddrs=LOOPBACK).start()) as node:

        async def read() -> bool:
            control, call_id = node.p2p._client.control, uuid4()
            given_up = asyncio.get_running_loop().create_future()
            given_up.cancel()
            control._pending_calls[call_id] = given_up
            reader = asyncio.StreamReader()
            for kind in ("callUnaryResponse", "daemonError"):
                response = p2pd_pb2.PersistentConnectionResponse(callId=call_id.bytes)
                if kind == "daemonError":
                    response.daemonError.message = "no route"
                else:
                    response.callUnaryResponse.response = b"late"
                varint = _Bytes()
                await write_unsigned_varint(varint, response.ByteSize())
                reader.feed_data(bytes(varint.data) + response.SerializeToString())
            reader.feed_eof()
            await control._read_from_persistent_conn(reader)
            return reader.at_eof()

        assert node.run(read())


def test_calls_that_their_callers_gave_up_are_forgotten():
    with (
        closing(SwarmNode(host_maddrs=LOOPBACK).start()) as server,
        closing(SwarmNode(server.visible_maddrs(), host_maddrs=(), client_mode=True).start()) as client,
    ):
        begun = []

        async def handler(request: PingRequest, context: object) -> PingResponse:
            begun.append(request)
            await asyncio.sleep(60)
            return PingResponse()

        server.run(server.p2p.add_protobuf_handler("slow", handler, PingRequest))
        tasks = server.p2p._client.control._handler_tasks

        async def give_up() -> None:
            calls = [
                asyncio.create_task(
                    client.p2p.call_protobuf_handler(server.peer_id, "slow", PingRequest(), PingResponse)
                )
                for _ in range(5)
            ]
            while len(begun) < 5:
                await asyncio.sleep(0.01)
            assert len(tasks) >= 5
            for call in calls:
                call.cancel()
            while tasks:
                await asyncio.sleep(0.01)

        client.run(asyncio.wait_for(give_up(), 10))


def test_a_record_that_cannot_be_read_neither_ends_a_reader_nor_hides_others():
    record = ServerRecord(ServerState.ONLINE, 3.0, 0, 2)
    nested = msgpack.packb([])
    for _ in range(900):
        nested = msgpack.packb([msgpack.ExtType(0x40, nested)])
    with (
        closing(SwarmNode(host_maddrs=LOOPBACK).start()) as holder,
        closing(SwarmNode(holder.visible_maddrs(), host_maddrs=(), client_mode=True).start()) as attacker,
        closing(SwarmNode(holder.visible_maddrs(), host_maddrs=(), client_mode=True).start()) as reader,
    ):
        assert holder.run(SwarmDirectory(holder).announce("m", record, 60))

        async def store(value: bytes, subkey: str) -> None:
            key, expires = DHTID.generate(source="m.0"), get_dht_time() + 60
            await attacker.dht.protocol.call_store(holder.peer_id, [key], [value], expires, subkeys=[subkey])

        attacker.run(store(nested, "Qm1"))
        attacker.run(store(b"\xc1 no msgpack", "Qm2"))
        for node in (holder, reader):
            found = node.run(node.dht.get("m.0", latest=True)).value
            assert {"Qm1", "Qm2"} < set(found)
            assert found["Qm1"].value is found["Qm2"].value is None
            assert node.run(SwarmDirectory(node).servers("m", 1)) == [{holder.peer_id.to_base58(): record}]


class _Bytes:
    """As much of a StreamWriter as is needed to write into memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        pass
