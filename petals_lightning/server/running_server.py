"""A server that is in the swarm: takes streams, announces itself, and leaves in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from hivemind.p2p.p2p_daemon_bindings.control import StreamHandler
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from petals_lightning.errors import SwarmConnectionError
from petals_lightning.protocol.messages import STREAM_METHOD
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.server.announcer import DAEMON_ERRORS, Announcer
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.petals import PetalsMethods
from petals_lightning.server.resources import ServerResources
from petals_lightning.swarm import SwarmNode

logger = logging.getLogger(__name__)


class RunningServer:
    """A server that clients can use until `stop`; `Server.start` makes one.

    Args:
        node: this process's peer, started; closed with the server.
        resources: what streams share, with a started compute thread.
        dht_prefix: name of the model in the DHT.
        announcer: of this server.
        petals_only: offer only Petals' methods, not our own stream method.

    Attributes:
        streams: the clients' open streams, by number.
        stop_metrics: what ends the server's figures for Prometheus, if it has any.
    """

    def __init__(
        self, node: SwarmNode, resources: ServerResources, dht_prefix: str, announcer: Announcer, *, petals_only: bool
    ):
        self.node, self.resources, self.dht_prefix = node, resources, dht_prefix
        self._announcer, self._petals_only = announcer, petals_only
        self.stop_metrics: Callable[[], None] | None = None
        self.streams: dict[int, ClientStream] = {}
        self._stream_tasks: set[asyncio.Task[None]] = set()
        self._announcing: asyncio.Task[None] | None = None

    @property
    def span(self) -> BlockSpan:
        return self.resources.span

    @property
    def record(self) -> ServerRecord:
        """What the server announces."""
        return self._announcer.record

    async def open(self) -> None:
        """Takes streams and announces the server. Returns when clients can find it.

        Raises:
            SwarmConnectionError: no peer took the record.
        """
        petals = PetalsMethods(self.resources, self.dht_prefix, self.node.p2p)
        await petals.register()
        methods: dict[str, StreamHandler] = {
            name: partial(petals.serve_stream, method) for name, method in petals.streams.items()
        }
        if not self._petals_only:
            methods[STREAM_METHOD] = self._serve_client
        for name, serve in methods.items():
            await self.node.p2p.add_binary_stream_handler(name, partial(self._handle_stream, serve))
        if not await self._announcer.announce():
            raise SwarmConnectionError(
                f"the swarm took no record of {self.dht_prefix!r}: check that this machine's clock is right and its "
                "peers answer"
            )
        self._announcing = asyncio.create_task(self._announcer.announce_forever())

    def stop(self, timeout: float = 5.0) -> None:
        """Announces that it leaves, finishes open requests within `timeout` seconds, and closes everything.

        May be called again: it then does nothing.
        """
        deadline = time.monotonic() + timeout
        announcing, self._announcing = self._announcing, None
        try:
            if announcing is not None:
                self.node.run(self._leave(announcing, timeout))
        finally:
            self.resources.compute.stop(max(0.0, deadline - time.monotonic()))
            if self.stop_metrics is not None:
                self.stop_metrics()
            self.node.close()

    async def _leave(self, announcing: asyncio.Task[None], timeout: float) -> None:
        self.resources.leaving = True
        announcing.cancel()
        await asyncio.wait([announcing])
        deadline = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout / 2):
                await self._announcer.announce(ServerState.OFFLINE)
        except DAEMON_ERRORS:
            logger.warning("no peer took the message that this server leaves; its record expires by itself")
        while self.resources.open_requests and time.monotonic() < deadline:  # noqa: ASYNC110 (a server stops once)
            await asyncio.sleep(0.02)
        for task in list(self._stream_tasks):
            task.cancel()
        if self.resources.links is not None:
            self.resources.links.close()

    async def _serve_client(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ClientStream(self.resources, self.streams, info.peer_id.to_base58(), reader, writer).serve()

    async def _handle_stream(
        self,
        serve: StreamHandler,
        info: StreamInfo,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        # Streams beyond the limit are refused with a message, but not too many at once.
        if len(self._stream_tasks) >= self.resources.limits.all_streams * 3 // 2:
            writer.close()
            return
        self._stream_tasks.add(task)
        try:
            await serve(info, reader, writer)
        except asyncio.CancelledError:
            if not self.resources.leaving:
                raise
        finally:
            self._stream_tasks.discard(task)
