"""What a stranger can make a peer keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hivemind.dht.routing import DHTID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.protocol.signed_records import SUBKEY_PREFIX, signed_key
from petals_lightning.swarm import SwarmDirectory, SwarmNode, record_keeping
from petals_lightning.swarm.record_keeping import MAX_KEY_BYTES, MAX_PEER_BYTES, MAX_RECORD_BYTES
from tools.testing.swarms import LOOPBACK

LARGE = b"x" * (MAX_RECORD_BYTES - 64)


@pytest.fixture
def join() -> Iterator[Callable[[], SwarmNode]]:
    """Each call gives another peer of one swarm; the first is the one that keeps records."""
    nodes: list[SwarmNode] = []
    with ExitStack() as stack:

        def start() -> SwarmNode:
            peers = nodes[0].visible_maddrs() if nodes else []
            nodes.append(stack.enter_context(SwarmNode(peers, host_maddrs=LOOPBACK).start()))
            return nodes[-1]

        yield start


def store(
    sender: SwarmNode, holder: SwarmNode, records: list[tuple[str, str]], value: bytes = LARGE, lifetime: float = 600
) -> list[bool]:
    """Has records of `value` stored under (key, subkey); which of them the holder takes."""

    async def call() -> list[bool]:
        taken: list[bool] = []
        for begin in range(0, len(records), 50):
            part = records[begin : begin + 50]
            stored = await sender.dht.protocol.call_store(
                holder.peer_id,
                [DHTID.generate(source=key) for key, _ in part],
                [sender.dht.protocol.serializer.dumps(value)] * len(part),
                [get_dht_time() + lifetime + 1e-3 * number for number in range(len(part))],
                subkeys=[subkey for _, subkey in part],
            )
            assert stored is not None
            taken += stored
        return taken

    return sender.run(call())


def kept(holder: SwarmNode) -> int:
    """Bytes of all records that a peer keeps."""
    items = [item for _, item in holder.dht.protocol.storage.items()]
    return sum(len(record.value) for item in items for _, record in item.value.items())


def test_one_peer_fills_its_share_and_no_more(join) -> None:
    holder, stranger, other = join(), join(), join()
    names = [(f"key {number}", "s") for number in range(2 * MAX_PEER_BYTES // len(LARGE))]
    taken = store(stranger, holder, names)
    assert 0.9 * MAX_PEER_BYTES < kept(holder) <= MAX_PEER_BYTES
    assert sum(taken) * len(LARGE) <= MAX_PEER_BYTES
    assert all(store(other, holder, [("of another peer", "s")]))
    assert all(store(stranger, holder, names[:3], lifetime=700)), "what is there can be renewed"


def test_a_peer_that_brings_what_it_keeps_can_still_store_its_own(join) -> None:
    holder, server = join(), join()
    names = [(f"key {number}", "somebody") for number in range(2 * MAX_PEER_BYTES // len(LARGE))]
    assert not all(store(server, holder, names))
    peer = server.peer_id.to_base58()
    assert all(store(server, holder, [("m.0", peer)]))
    own = [(f"own {number}", peer) for number in range(2 * MAX_PEER_BYTES // len(LARGE))]
    assert not all(store(server, holder, own))
    assert kept(holder) <= 2 * MAX_PEER_BYTES


def test_an_answer_about_one_key_can_always_be_sent(join) -> None:
    holder, stranger = join(), join()
    taken = store(stranger, holder, [("key", f"subkey {number}") for number in range(2 * MAX_KEY_BYTES // len(LARGE))])
    assert any(taken)
    assert not taken[-1]
    assert 0.9 * MAX_KEY_BYTES < kept(holder) <= MAX_KEY_BYTES
    found = stranger.run(stranger.dht.protocol.call_find(holder.peer_id, [DHTID.generate(source="key")]))
    assert len(next(iter(found.values()))[0].value) == sum(taken)


def test_what_is_not_signed_keeps_no_signed_record_out(join) -> None:
    holder, stranger, server = join(), join(), join()
    names = [(signed_key("m"), f"junk {number}") for number in range(2 * MAX_KEY_BYTES // len(LARGE))]
    assert not store(stranger, holder, names)[-1]
    record = ServerRecord(ServerState.ONLINE, 3.0, 0, 2, stream_version=1)
    assert server.run(SwarmDirectory(server).announce("m", record, 60))
    item = holder.dht.protocol.storage.get(DHTID.generate(source=signed_key("m")))
    assert SUBKEY_PREFIX + server.peer_id.to_base58() in item.value


def test_a_record_that_has_come_before_counts_as_stored(join) -> None:
    holder, one, other = join(), join(), join()
    expires = get_dht_time() + 60

    def bring(sender: SwarmNode, value: bytes, expires: float) -> list[bool]:
        key, protocol = DHTID.generate(source="key"), sender.dht.protocol
        return sender.run(protocol.call_store(holder.peer_id, [key], [value], expires, subkeys=["subkey"]))

    assert bring(one, b"x", expires) == bring(other, b"x", expires) == [True]
    assert bring(other, b"y", expires) == bring(other, b"x", expires - 1) == [False]


def test_all_peers_together_fill_no_more_than_the_total(join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_keeping, "MAX_BYTES", 20 * MAX_RECORD_BYTES)
    holder = join()
    taken = [store(join(), holder, [(f"{peer} {number}", "s") for number in range(15)]) for peer in range(2)]
    assert all(taken[0])
    assert sum(taken[1]) == 5
    assert kept(holder) <= 20 * MAX_RECORD_BYTES


def test_a_large_record_is_not_taken(join) -> None:
    holder, stranger = join(), join()
    assert store(stranger, holder, [("key", "subkey")], value=b"x" * (MAX_RECORD_BYTES + 1)) == [False]
    assert store(stranger, holder, [("key", "subkey")]) == [True]


@pytest.mark.slow
def test_room_comes_back_when_records_end(join, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_keeping, "MAX_PEER_BYTES", 10 * MAX_RECORD_BYTES)
    holder, stranger = join(), join()
    assert sum(store(stranger, holder, [(f"short {number}", "s") for number in range(12)], lifetime=1.0)) == 10

    def takes_more() -> bool:
        return all(store(stranger, holder, [("later", "s")]))

    deadline = get_dht_time() + 20
    while not (taken := takes_more()) and get_dht_time() < deadline:
        pass
    assert taken


def test_renewals_leave_nothing_behind(join) -> None:
    holder, stranger = join(), join()
    for number in range(60):
        store(stranger, holder, [("key", "subkey")] * 50, value=b"x", lifetime=600 + number)
    ((_, item),) = holder.dht.protocol.storage.items()
    for storage in (holder.dht.protocol.storage, item.value):
        assert len(storage.expiration_heap) < 1100
