"""Peers that attack an honest server, each in a process of its own; what a stranger can do without a token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from hivemind.dht.routing import DHTID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.identity import Identity
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.protocol.signed_records import LISTED_KEY, SUBKEY_PREFIX, SignedRecord, signed_key
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.uids import MODELS_KEY, block_uid
from tools.testing.attacker import Attacker, announcement, petals_announcement, upload

MIB = 1 << 20


@dataclass
class Victim:
    """A server as a stranger sees it.

    Attributes:
        maddr: an address in its swarm.
        peer_id: its id.
        prefix, num_blocks, hidden_size: of the model that it serves, all blocks of it.
    """

    maddr: str
    peer_id: str
    prefix: str
    num_blocks: int
    hidden_size: int


Round = Callable[[], None]


def records(victim: Victim, attackers: list[Attacker], changes: dict[str, Any]) -> Round:
    """Stores another record under the server's id, under each block, again and again."""
    stranger = attackers[0]
    record = ServerRecord(ServerState.ONLINE, 1.0, 0, victim.num_blocks, stream_version=STREAM_VERSION)
    value = replace(record, **changes).to_value()
    return lambda: _store(
        stranger, [(block_uid(victim.prefix, block), victim.peer_id, value) for block in range(victim.num_blocks)]
    )


def records_that_never_end(victim: Victim, attackers: list[Attacker]) -> Round:
    value = ServerRecord(ServerState.OFFLINE, 0.0).to_value()
    keys = [(block_uid(victim.prefix, block), victim.peer_id, value) for block in range(victim.num_blocks)]
    return lambda: _store(attackers[0], keys, lifetime=10 * 365 * 86400.0)


def plain_values(victim: Victim, attackers: list[Attacker]) -> Round:
    keys = [
        *(block_uid(victim.prefix, block) for block in range(victim.num_blocks)),
        signed_key(victim.prefix),
        MODELS_KEY,
        LISTED_KEY,
    ]
    return lambda: _store(attackers[0], [(key, None, "nothing") for key in keys])


def forged_signatures(victim: Victim, attackers: list[Attacker]) -> Round:
    offline = ServerRecord(ServerState.OFFLINE, 0.0, 0, victim.num_blocks, stream_version=STREAM_VERSION)

    def again() -> None:
        value = SignedRecord.sign(offline, victim.prefix, get_dht_time() + 600, Identity.new(), None)
        _store(
            attackers[0],
            [(key, SUBKEY_PREFIX + victim.peer_id, value) for key in (signed_key(victim.prefix), LISTED_KEY)],
        )

    return again


def a_flood_of_records(victim: Victim, attackers: list[Attacker]) -> Round:
    numbers, value = count(), b"x" * 15_000
    return lambda: _store(attackers[0], [(f"flood {next(numbers)}", "s", value) for _ in range(100)])


def a_flood_under_the_models_keys(victim: Victim, attackers: list[Attacker]) -> Round:
    numbers, value = count(), b"x" * 15_000
    keys = [block_uid(victim.prefix, 0), signed_key(victim.prefix), MODELS_KEY, LISTED_KEY]
    return lambda: _store(attackers[0], [(key, f"flood {next(numbers)}", value) for key in keys for _ in range(20)])


def announcements_of_much(victim: Victim, attackers: list[Attacker]) -> Round:
    """Headers of 1 GiB each, on streams that stay open."""

    async def announce(peer: Attacker) -> None:
        for stream in [await peer.stream() for _ in range(2)]:
            await stream.write(announcement(1, 1 << 30))
            await stream.ask(2, Message(Method.PING))

    return _once(lambda: [peer.run(announce(peer)) for peer in attackers])


def uploads_that_never_end(victim: Victim, attackers: list[Attacker]) -> Round:
    async def fill(peer: Attacker) -> None:
        for stream in [await peer.stream() for _ in range(4)]:
            await upload(stream, [1], 256 * MIB)

    return _once(lambda: [peer.run(fill(peer)) for peer in attackers])


def prompts_that_nobody_uses(victim: Victim, attackers: list[Attacker]) -> Round:
    async def register(peer: Attacker) -> None:
        deep = torch.ones(victim.num_blocks, 2000, victim.hidden_size)
        for stream in [await peer.stream() for _ in range(4)]:
            for key in range(8):
                await stream.send(100 + key, Adapter(0, victim.num_blocks, deep).to_message(key))
            await stream.ask(2, Message(Method.PING))

    return _once(lambda: [peer.run(register(peer)) for peer in attackers])


def sessions_that_nobody_uses(victim: Victim, attackers: list[Attacker]) -> Round:
    async def reserve(peer: Attacker) -> None:
        stream = await peer.stream()
        for number in range(400):
            hidden = torch.ones(1, 1, victim.hidden_size)
            await stream.ask(
                number + 1, StepRequest(number, 0, victim.num_blocks, hidden, 0, 1 + 100 * (number < 20)).to_message()
            )

    return _once(lambda: [peer.run(reserve(peer)) for peer in attackers])


def streams_without_end(victim: Victim, attackers: list[Attacker]) -> Round:
    async def open_all(peer: Attacker) -> None:
        for _ in range(40):
            stream = await peer.stream()
            await stream.send(1, Message(Method.PING))

    return _once(lambda: [peer.run(open_all(peer)) for peer in attackers])


def petals_calls_of_much(victim: Victim, attackers: list[Attacker]) -> Round:
    async def announce(peer: Attacker) -> None:
        for method in ("rpc_forward_stream", "rpc_backward_stream", "rpc_inference") * 4:
            _, writer = await peer.petals_stream(method)
            writer.write(petals_announcement(1 << 30) + b"\1" * 100_000)

    return _once(lambda: [peer.run(announce(peer)) for peer in attackers])


def nonsense(victim: Victim, attackers: list[Attacker]) -> Round:
    generator = torch.Generator().manual_seed(0)

    async def write(peer: Attacker) -> None:
        stream = await peer.stream()
        await stream.write(bytes(torch.randint(0, 256, (4096,), generator=generator, dtype=torch.uint8).tolist()))
        stream.writer.close()

    return lambda: attackers[0].run(write(attackers[0]))


def large_inference_steps(victim: Victim, attackers: list[Attacker]) -> Round:
    """Steps of many positions back to back, on four streams."""
    numbers = count(1)

    async def one(peer: Attacker) -> None:
        streams = [await peer.stream() for _ in range(4)]
        hidden = torch.ones(8, 120, victim.hidden_size)

        async def ask(stream: Any) -> None:
            number = next(numbers)
            await stream.ask(number, StepRequest(number, 0, victim.num_blocks, hidden, 0, 120).to_message())
            await stream.send(next(numbers), Message(Method.END_SESSION, {"session": number}))
            stream.writer.close()

        await asyncio.gather(*map(ask, streams))

    return lambda: attackers[0].run(one(attackers[0]))


def forwards_without_end(victim: Victim, attackers: list[Attacker]) -> Round:
    numbers = count(1)

    async def many(peer: Attacker) -> None:
        stream = await peer.stream()
        hidden = torch.ones(8, 120, victim.hidden_size)
        for _ in range(8):
            await stream.send(next(numbers), ForwardRequest(0, victim.num_blocks, hidden).to_message())
        for _ in range(8):
            await stream.reply()
        stream.writer.close()

    return lambda: attackers[0].run(many(attackers[0]))


ATTACKS: dict[str, tuple[int, Callable[[Victim, list[Attacker]], Round]]] = {
    "records: away": (1, lambda victim, peers: records(victim, peers, {"state": ServerState.OFFLINE})),
    "records: another model": (1, lambda victim, peers: records(victim, peers, {"hidden_size": 7})),
    "records: for ten years": (1, records_that_never_end),
    "records: plain values": (1, plain_values),
    "records: forged": (1, forged_signatures),
    "records: a flood": (1, a_flood_of_records),
    "records: a flood on keys": (1, a_flood_under_the_models_keys),
    "memory: announcements": (4, announcements_of_much),
    "memory: uploads": (3, uploads_that_never_end),
    "memory: prompts": (3, prompts_that_nobody_uses),
    "memory: sessions": (3, sessions_that_nobody_uses),
    "memory: Petals' calls": (3, petals_calls_of_much),
    "streams: 33 identities": (33, streams_without_end),
    "streams: nonsense": (1, nonsense),
    "compute: large steps": (1, large_inference_steps),
    "compute: forwards": (1, forwards_without_end),
}
"""How many identities each takes, and what it does; what it returns is called again and again."""


def _once(act: Callable[[], Any]) -> Round:
    acts: Iterator[Callable[[], Any]] = iter([act])

    def again() -> None:
        next(acts, lambda: None)()

    return again


def _store(peer: Attacker, records: list[tuple[str, Any, Any]], lifetime: float = 1800.0) -> None:
    async def store() -> None:
        protocol = peer.node.dht.protocol
        for holder in list(protocol.routing_table.peer_id_to_uid):
            await protocol.call_store(
                holder,
                [DHTID.generate(source=key) for key, _, _ in records],
                [protocol.serializer.dumps(value) for _, _, value in records],
                get_dht_time() + lifetime,
                subkeys=[subkey for _, subkey, _ in records],
            )

    peer.run(store())
