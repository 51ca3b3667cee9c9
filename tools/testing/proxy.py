"""A TCP proxy between peers that can delay, throttle, cut and black-hole what passes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SharedLink:
    """A link that several connections share, through whichever proxies: `rate` bytes a second in each direction.

    Attributes:
        rate: may be changed while bytes pass.
    """

    def __init__(self, rate: float):
        self.rate, self._free_at, self._lock = rate, [0.0, 0.0], threading.Lock()

    def book(self, direction: int, came: float, num_bytes: int) -> float:
        """When bytes that came at `came` have passed, behind those booked before; in `time.monotonic` seconds."""
        with self._lock:
            self._free_at[direction] = max(self._free_at[direction], came) + num_bytes / self.rate
            return self._free_at[direction]


class TcpProxy:
    """Passes connections to 127.0.0.1:`target` on, in a thread of its own. Faults may be set from any thread.

    Attributes:
        port: where it listens.
        delay: seconds that every piece of data is late.
        link: what connections that are opened from now on share; None for no limit of speed.
    """

    def __init__(self, target: int):
        self._target = target
        self.delay = 0.0
        self.link: SharedLink | None = None
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def black_hole(self) -> None:
        """Nothing passes any more and nobody is told, as when a cable is pulled."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def cut(self) -> None:
        """Ends all connections; new ones are taken."""

        async def close() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._run(close())

    def heal(self) -> None:
        self.delay = 0.0
        self._loop.call_soon_threadsafe(self._flows.set)

    def close(self) -> None:
        self.heal()

        async def stop() -> None:
            self._server.close()
            while left := asyncio.all_tasks() - {asyncio.current_task()}:  # connections may just be coming in
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                await asyncio.sleep(0)

        self._run(stop())
        self.cut()
        self._run(asyncio.sleep(0))  # aborted connections are closed in the next turn
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Not a coroutine: one that is cancelled before its first step would leave its connection open.
        self._writers.add(writer)
        task = self._loop.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

        def end(_: object) -> None:
            writer.transport.abort()
            self._writers.discard(writer)

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the server is dead, so the port looks closed
            return
        self._writers.add(back)
        try:
            await asyncio.gather(self._pump(reader, back, 0, self.link), self._pump(there, writer, 1, self.link))
        finally:
            self._writers.discard(back)
            back.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int, link: SharedLink | None
    ) -> None:
        """Passes one direction on; data waits in order, so a delay is latency and no limit of speed."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def deliver() -> None:
            while True:
                due, data = await late.get()
                await asyncio.sleep(due - time.monotonic())
                await self._flows.wait()
                if not data:
                    return
                if link is not None:
                    await asyncio.sleep(link.book(direction, due, len(data)) - time.monotonic())
                writer.write(data)
                await writer.drain()

        delivery = asyncio.create_task(deliver())
        try:
            while True:
                await self._flows.wait()
                data = await reader.read(1 << 16)
                await late.put((time.monotonic() + self.delay, data))
                if not data:
                    break
            await delivery
        except OSError:
            pass  # cut, or ended by either side: the other side is told below
        finally:
            delivery.cancel()
            writer.transport.abort()
