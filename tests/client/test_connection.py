"""The failure detector, against scripted servers: a long queue is no hang, an unanswered ping is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import torch

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.timeouts import request_timeouts
from petals_lightning.errors import ConfigurationError, PeerFailure
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.requests import ForwardRequest
from tools.testing.attacker import announcement, piece

CONFIG = ClientConfig(heartbeat_period=0.1, heartbeat_timeout=0.5)
Reply = Callable[[Method, int], Message | None]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def connected_to(serve: Serve, on_failure: Callable[[PeerFailure], None]) -> AsyncIterator[PeerConnection]:
    """A connection to a server that is `serve`; both ends are closed at the end."""
    ended = asyncio.Event()

    async def serve_until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()
            ended.set()

    server = await asyncio.start_server(serve_until_closed, "127.0.0.1", 0)
    streams = await asyncio.open_connection(*server.sockets[0].getsockname())
    connection = PeerConnection("QmServer", *streams, CONFIG, TransferStats(), on_failure).start()
    try:
        yield connection
    finally:
        connection.close()
        await asyncio.wait_for(ended.wait(), 20)
        server.close()
        await asyncio.sleep(0)  # an aborted connection is closed in the next turn


def with_server(reply: Reply, talk: Callable[[PeerConnection], Awaitable[None]]) -> list[PeerFailure]:
    """Runs `talk(connection)`; the server answers `reply(method, call id)`, or not at all where that is None."""
    failures: list[PeerFailure] = []

    async def main() -> None:
        async def serve(reader, writer):
            incoming, outgoing = MessageReader(reader, max_message_bytes=1 << 20, max_open=10), MessageWriter(writer)
            while (item := await incoming.next()) is not None:
                if (answer := reply(item[1].method, item[0])) is not None:
                    await outgoing.send(item[0], answer)

        async with connected_to(serve, failures.append) as connection:
            await asyncio.wait_for(talk(connection), 20)

    asyncio.run(main())
    return failures


@pytest.mark.slow
def test_a_request_in_a_long_queue_is_waited_for():
    began = time.monotonic()

    def reply(method, call_id):
        if method is Method.PING:
            waits = time.monotonic() - began < 1.5
            return Message(Method.OK, {"calls": [[1, 5 if waits else 0]]})
        return None

    async def talk(connection):
        with pytest.raises(PeerFailure, match="of work on a request"):
            await connection.call(Message(Method.FORWARD), deadline=0.6)
        assert time.monotonic() - began > 1.5 + 0.4, "the deadline ran while the request stood in the queue"
        assert connection.is_open, "a request that is late says nothing of the others"

    assert with_server(reply, talk) == []


def test_a_ping_that_is_not_answered_is_a_hang():
    async def talk(connection):
        began = time.monotonic()
        with pytest.raises(PeerFailure, match="ping was not answered"):
            await connection.call(Message(Method.FORWARD))
        assert 0.4 < time.monotonic() - began < 2

    assert len(with_server(lambda method, call_id: None, talk)) == 1


def test_a_hang_is_found_also_when_nobody_waits_any_more():
    async def talk(connection):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.call(Message(Method.FORWARD)), 0.3)
        while connection.is_open:
            await asyncio.sleep(0.05)

    assert "ping was not answered" in str(with_server(lambda method, call_id: None, talk)[0])


def test_an_idle_connection_is_left_alone():
    async def talk(connection):
        await asyncio.sleep(1.0)
        assert connection.is_open

    assert with_server(lambda method, call_id: None, talk) == []


@pytest.mark.parametrize(
    ("method", "call_id"), [(Method.FORWARD, 1), (Method.OK, 7)], ids=["a request", "an answer nobody asked for"]
)
def test_a_server_that_breaks_the_protocol_is_left(method, call_id):
    async def talk(connection):
        writer = connection._writer
        await writer.send(1, Message(Method.PING))  # echoed back by `serve` as `method`
        with pytest.raises(PeerFailure, match="protocol broken"):
            await connection.call(Message(Method.FORWARD), 1 if call_id == 1 else None)

    def reply(got, got_id):
        return Message(method) if got is Method.FORWARD else None

    if call_id == 1:
        assert len(with_server(reply, talk)) == 1
        return

    async def impostor(connection):
        connection._take(0, Message(Method.OK))
        with pytest.raises(Exception, match="never made"):
            connection._take(call_id, Message(method))

    with_server(reply, impostor)


def test_request_timeouts_follow_measurements_between_floor_and_ceiling():
    config = ClientConfig(request_timeout=100, min_request_timeout=10, deadline_factor=20, hedge_factor=4)
    assert request_timeouts(1.0, False, config).deadline == 100, "a claim is not a measurement"
    assert request_timeouts(1.0, False, config).hedge == 4
    assert request_timeouts(0.01, True, config).deadline == 10
    assert request_timeouts(1.0, True, config).deadline == 20
    assert request_timeouts(50.0, True, config).deadline == 100
    assert request_timeouts(1.0, True, config).hedge == 4
    assert request_timeouts(0.01, True, config).hedge == 2 * config.heartbeat_period
    assert request_timeouts(1.0, True, ClientConfig(hedge_factor=None)).hedge is None


@pytest.mark.parametrize(
    "wrong",
    [{"audit_rate": 1.5}, {"hedge_factor": 1.0}, {"deadline_factor": 0}, {"swarm_token": "short"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"must|share"):
        ClientConfig(**wrong)


def test_an_answer_is_no_larger_than_what_was_asked_for():
    """The server's word costs the client no memory: neither more than was asked for, nor for what was given up."""

    async def main() -> tuple[str, int]:
        async def serve(reader, writer):
            writer.write(announcement(7, 1 << 31, "ok"))  # an answer to a call that was given up, and is let pass
            for _ in range(8):
                writer.write(piece(7))
            incoming = MessageReader(reader, max_message_bytes=1 << 20, max_open=10)
            while (item := await incoming.next()) is not None:
                if item[1].method is Method.FORWARD:
                    writer.write(announcement(item[0], 3 << 30, "ok"))

        async with connected_to(serve, lambda failure: None) as connection:
            connection._last_id = 10
            with pytest.raises(PeerFailure) as failed:
                await connection.call(ForwardRequest(0, 1, torch.ones(2, 3, 4)).to_message())
            return str(failed.value), sum(len(p.body or b"") for p in connection._reader._partial.values())

    words, held = asyncio.run(main())
    assert f"announces {3 << 30} bytes, {8 * 2 * 3 * 4} are the most that were asked for" in words
    assert held == 0
