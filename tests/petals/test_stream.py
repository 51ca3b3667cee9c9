"""How an answering stream ends."""

from __future__ import annotations

import asyncio
import socket

from petals_lightning.server.petals import stream


async def connected() -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return [await asyncio.open_unix_connection(sock=end) for end in socket.socketpair()]


def test_it_is_closed_when_the_client_has_read_the_answer_and_closed_it():
    async def main() -> None:
        (reader, writer), (client_reader, client_writer) = await connected()
        writer.write(b"answer")
        ending = asyncio.create_task(stream.end(reader, writer))
        assert await client_reader.read() == b"answer"  # to its end
        assert not writer.is_closing()
        client_writer.close()
        await asyncio.wait_for(ending, 1)
        assert writer.is_closing()

    asyncio.run(main())


def test_it_is_closed_in_time_if_the_client_does_not(monkeypatch):
    monkeypatch.setattr(stream, "_FAREWELL", 0.05)

    async def main() -> None:
        (reader, writer), (_, client_writer) = await connected()
        await asyncio.wait_for(stream.end(reader, writer), 1)
        assert writer.is_closing()
        client_writer.close()

    asyncio.run(main())
