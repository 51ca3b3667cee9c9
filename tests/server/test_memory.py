"""A hostile peer takes no more of a server's memory than its share, and an honest one beside it is served."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from petals_lightning.cli.main import main
from petals_lightning.options import command_line
from petals_lightning.protocol import framing, uploads
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode, Message, Method
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.strategies.server_process import ServerProcess
from tests.helpers.families import HIDDEN, NUM_BLOCKS
from tools.testing.attacker import (
    Attacker,
    RawStream,
    announcement,
    empty_tensors,
    petals_announcement,
    piece,
    resident,
    upload,
)
from tools.testing.servers import start_server

pytestmark = [pytest.mark.ours("servers are spoken to directly"), pytest.mark.slow]

MIB = 1 << 20
MESSAGE, CLIENT, TOTAL = 32 * MIB, 64 * MIB, 192 * MIB
SLACK = 12 * MIB  # what an interpreter, its threads and its heap go up and down by


SMALL = ServerLimits(
    cache_bytes=64 * MIB, max_message_bytes=MESSAGE, max_client_bytes=CLIENT, max_total_bytes=TOTAL, max_streams=32,
    max_sessions_per_client=50,
)  # fmt: skip


def main_in_a_hurry() -> None:
    uploads.WINDOW = framing.WINDOW = 6.0  # type: ignore[attr-defined]
    uploads.LEAST_BYTES = 48 << 10
    main()


@pytest.fixture(scope="module")
def server(tiny_checkpoint) -> Iterator[ServerProcess]:
    process = start_server(tiny_checkpoint("llama"), None, (), *command_line(SMALL))
    yield process.wait_until_ready()
    process.stop()


@pytest.fixture(scope="module")
def hasty_server(tiny_checkpoint) -> Iterator[ServerProcess]:
    process = start_server(tiny_checkpoint("llama"), None, program=main_in_a_hurry)
    yield process.wait_until_ready()
    process.stop()


@pytest.fixture
def peers() -> Iterator[Callable[[ServerProcess, int], list[Attacker]]]:
    started: list[Attacker] = []

    def start(server: ServerProcess, count: int) -> list[Attacker]:
        new = [Attacker(server) for _ in range(count)]
        started.extend(new)
        return new

    yield start
    for peer in started:
        peer.close()


def forward(tokens: int = 8) -> Message:
    return ForwardRequest(0, NUM_BLOCKS, torch.ones(1, tokens, HIDDEN)).to_message()


def step(number: int, max_length: int) -> Message:
    return StepRequest(number, 0, NUM_BLOCKS, torch.ones(1, 1, HIDDEN), 0, max_length).to_message()


def assert_served(honest: Attacker) -> None:
    async def once() -> Message:
        stream = await honest.stream()
        reply = await stream.ask(1, forward(512))
        stream.writer.close()
        return reply

    reply = honest.run(once())
    assert reply.method is Method.OK, reply.fields


def settled(server: ServerProcess, most: int) -> int:
    """The process's memory, when it has come down to `most` or has had the time for it."""
    deadline = time.monotonic() + 15
    while resident(server.pid) > most and time.monotonic() < deadline:
        time.sleep(0.1)
    return resident(server.pid)


def close_all(peer: Attacker, streams: list[RawStream]) -> None:
    async def close() -> None:
        for stream in streams:
            stream.writer.close()

    peer.run(close())


def test_an_announcement_takes_no_memory_and_nobodys_room(server, peers):
    *attackers, honest = peers(server, 3)
    assert_served(honest)
    before = resident(server.pid)

    async def announce(peer: Attacker) -> list[RawStream]:
        streams = [await peer.stream() for _ in range(4)]
        for stream in streams:
            await stream.write(announcement(1, MESSAGE))
        for stream in streams:
            await stream.ask(2, Message(Method.PING))
        return streams

    streams = [peer.run(announce(peer)) for peer in attackers]
    assert resident(server.pid) - before < SLACK < MESSAGE
    assert_served(honest)
    for peer, opened in zip(attackers, streams, strict=True):
        close_all(peer, opened)


def test_uploads_stay_within_the_budget_and_leave_room_for_those_who_hold_nothing(server, peers):
    *attackers, honest = peers(server, 4)
    assert_served(honest)
    before = resident(server.pid)

    async def fill(peer: Attacker) -> tuple[list[RawStream], Message]:
        """Uploads twice what a client may have; returns what it is told of the last."""
        streams = [await peer.stream() for _ in range(4)]
        for stream in streams:
            await upload(stream, [1], MESSAGE)
            await stream.ask(2, Message(Method.PING))
        await streams[-1].write(piece(1))
        told = await streams[-1].reply()
        assert told is not None
        return streams, told

    opened, words = [], []
    for peer in attackers:
        streams, told = peer.run(fill(peer))
        opened.append(streams)
        words.append((told.fields.get("code"), told.fields.get("message", "")))
    grown = resident(server.pid) - before
    assert CLIENT < grown < 1.1 * TOTAL, f"{grown / MIB:.0f} MiB"
    assert_served(honest)
    assert {code for code, _ in words} == {ErrorCode.OVERLOADED}
    assert "this client has" in words[0][1]
    assert "its limit is 64 MiB" in words[0][1]
    assert "this server is full" in words[-1][1]
    for peer, streams in zip(attackers, opened, strict=True):
        close_all(peer, streams)
    assert settled(server, before + SLACK) < before + 0.25 * TOTAL


def test_registered_prompts_are_the_clients_and_end_with_its_stream(server, peers):
    attacker, honest = peers(server, 2)
    assert_served(honest)
    before = resident(server.pid)

    async def register() -> list[RawStream]:
        streams = [await attacker.stream() for _ in range(3)]
        for stream in streams:
            for key in range(8):
                deep = torch.ones(NUM_BLOCKS, 30_000, HIDDEN)  # 15 MiB
                await stream.send(100 + key, Adapter(0, NUM_BLOCKS, deep).to_message(key))
            await stream.ask(2, Message(Method.PING))
        return streams

    streams = attacker.run(register())
    grown = resident(server.pid) - before
    assert grown < 1.1 * CLIENT + SLACK, f"{grown / MIB:.0f} MiB"
    assert_served(honest)
    close_all(attacker, streams)
    assert settled(server, before + SLACK) < before + 2 * SLACK, "kept after its stream"


@pytest.mark.parametrize(
    ("end", "shape", "words"),
    [
        (NUM_BLOCKS + 1, (NUM_BLOCKS + 1, 2, HIDDEN), "an adapter of blocks 0:5, this server has 0:4"),
        (1, (1, 2, HIDDEN + 1), "must be of hidden size"),
        (1, (1, 1 << 17, HIDDEN), "must be of fewer than"),
        (1, (0, 2, HIDDEN), "for blocks 0:1"),
        (2, (1, 2, HIDDEN), "for blocks 0:2"),
    ],
    ids=str,
)
def test_prompts_that_no_request_could_use_are_refused(end, shape, words, server, peers):
    (attacker,) = peers(server, 1)

    async def register() -> Message:
        stream = await attacker.stream()
        await stream.send(1, Adapter(0, end, torch.ones(shape, dtype=torch.float16)).to_message(1))
        told = await stream.reply()
        stream.writer.close()
        assert told is not None
        return told

    assert words in attacker.run(register()).fields["message"]


def test_one_client_can_neither_fill_the_cache_nor_open_sessions_without_end(server, peers):
    attacker, honest = peers(server, 2)

    async def fill(max_length: int) -> tuple[RawStream, list[Message]]:
        stream = await attacker.stream()
        replies: list[Message] = []
        while not replies or (replies[-1].method is Method.OK and len(replies) < 1000):
            replies.append(await stream.ask(len(replies) + 1, step(len(replies), max_length)))
        return stream, replies

    async def once() -> Message:
        stream = await honest.stream()
        reply = await stream.ask(1, step(1, 100))
        stream.writer.close()
        return reply

    stream, replies = attacker.run(fill(20_000))  # 9.8 MiB of 64
    assert len(replies) == 5
    assert "are left for this client, which has 39" in replies[-1].fields["message"]
    assert honest.run(once()).method is Method.OK
    close_all(attacker, [stream])
    while True:  # until the server has seen the end of the stream
        before = resident(server.pid)
        stream, replies = attacker.run(fill(1))
        close_all(attacker, [stream])
        if len(replies) > 1:
            break
    assert len(replies) == 51
    assert "this client has 50 sessions open" in replies[-1].fields["message"]
    assert resident(server.pid) - before < SLACK
    assert honest.run(once()).method is Method.OK


def test_all_clients_together_open_no_more_streams_than_the_process_can_have(server, peers):
    *attackers, honest, another = peers(server, 5)

    async def open_all(peer: Attacker) -> tuple[list[RawStream], Message]:
        streams: list[RawStream] = []
        while len(streams) < 40:
            stream = await peer.stream()
            reply = await stream.ask(1, Message(Method.PING))
            if reply.method is Method.ERROR:
                stream.writer.close()
                return streams, reply
            streams.append(stream)
        raise AssertionError("no limit")

    opened = [peer.run(open_all(peer)) for peer in attackers]
    assert [len(streams) for streams, _ in opened] == [8, 8, 8]
    assert "this client has 8 streams open" in opened[0][1].fields["message"]
    streams, told = honest.run(open_all(honest))
    assert len(streams) == 1
    assert "this server is full: 25 of 32 streams are open" in told.fields["message"]

    async def petals_session() -> bytes:
        reader, writer = await another.petals_stream("rpc_inference")
        writer.write(petals_announcement(1 << 60))
        try:
            return await asyncio.wait_for(reader.readuntil(b"limit"), 20)
        finally:
            writer.close()

    assert b"bad_request" in another.run(petals_session())  # it was let in
    for peer, (each, _) in zip([*attackers, honest], [*opened, (streams, told)], strict=True):
        close_all(peer, each)


def test_an_upload_that_stands_still_is_given_up_and_a_slow_one_is_not(hasty_server, peers):
    attacker, honest = peers(hasty_server, 2)
    assert_served(honest)
    before = resident(hasty_server.pid)

    async def stall() -> Message:
        stream = await attacker.stream()
        await upload(stream, [1], 64 * MIB)
        assert resident(hasty_server.pid) - before > 40 * MIB
        told = await stream.reply()
        assert told is not None
        return told

    async def drip() -> Message:
        """Small pieces all the time, which are too few."""
        stream = await attacker.stream()
        await stream.write(announcement(1, MIB))

        async def go_on() -> None:
            while True:
                await stream.write(piece(1, 100))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(go_on())
        told = await stream.reply()
        dripping.cancel()
        assert told is not None
        return told

    async def be_slow() -> Message:
        """64 KiB/s, for longer than the server waits for a stalled upload."""
        stream = await honest.stream()
        data = b"".join(b"".join(bytes(part) for part in frame) for frame in forward(5000).frames(1))
        for begin in range(0, len(data), 1 << 13):
            await stream.write(data[begin : begin + (1 << 13)])
            await asyncio.sleep(0.125)
        reply = await stream.reply()
        assert reply is not None
        return reply

    assert "has stalled: less than 48 KiB came in 6 s" in attacker.run(stall()).fields["message"]
    assert settled(hasty_server, before + SLACK) < before + SLACK, "its memory is not freed"
    with ThreadPoolExecutor() as pool:  # both at once: each takes longer than the server's patience
        dripped, slow = pool.submit(attacker.run, drip()), pool.submit(honest.run, be_slow())
    assert "has stalled" in dripped.result().fields["message"]
    assert slow.result().method is Method.OK


def test_a_petals_upload_that_stands_still_is_given_up(hasty_server, peers):
    (attacker,) = peers(hasty_server, 1)

    async def stall(method: str, data: bytes) -> bytes:
        reader, writer = await attacker.petals_stream(method)
        writer.write(data)
        await writer.drain()
        try:
            return await asyncio.wait_for(reader.readuntil(b"came in"), 30)
        finally:
            writer.close()

    async def stall_twice() -> list[bytes]:
        begun = petals_announcement(MIB) + b"\1" * 1000
        return list(await asyncio.gather(stall("rpc_inference", begun), stall("rpc_forward_stream", b"")))

    for told in attacker.run(stall_twice()):
        assert b"this call has stalled" in told


def test_petals_announcements_and_bombs_take_no_memory(server, peers):
    attacker, honest = peers(server, 2)
    assert_served(honest)
    before = resident(server.pid)

    async def announce() -> list[asyncio.StreamWriter]:
        writers = []
        for _ in range(6):
            _, writer = await attacker.petals_stream("rpc_forward_stream")
            writer.write(petals_announcement(MESSAGE) + b"\1" * 1000)
            await writer.drain()
            writers.append(writer)
        return writers

    async def explode(data: bytes) -> bytes:
        reader, writer = await attacker.petals_stream("rpc_forward_stream")
        writer.write(petals_announcement(len(data)) + data)
        try:
            return await asyncio.wait_for(reader.readuntil(b"fields"), 30)
        finally:
            writer.close()

    writers = attacker.run(announce())
    assert_served(honest)
    assert b"bad_request" in attacker.run(explode(empty_tensors(8 * MIB // 2)))
    assert "fields" in attacker.run(attacker.petals_unary("rpc_forward", empty_tensors(MIB)))
    assert resident(server.pid) - before < 4 * 8 * MIB
    gc.collect()

    async def close() -> None:
        for writer in writers:
            writer.close()

    attacker.run(close())
    assert_served(honest)
