"""A server that is in the swarm: takes streams, announces itself, and leaves in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.control import StreamHandler
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo

from petals_lightning.errors import SwarmConnectionError
from petals_lightning.protocol.messages import STREAM_METHOD
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.server.announcer import Announcer
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.petals import PetalsMethods
from petals_lightning.server.resources import ServerResources
from petals_lightning.swarm import SwarmNode

_LAST_SECONDS = 2.0  # for what is being computed, when a server that moves has waited for its clients


class RunningServer:
    """A server that clients can use until `stop`; `Server.start` makes one.

    Args:
        node: this process's peer, started; closed with the server.
        resources: what streams share, with a started compute thread.
        dht_prefix: name of the model in the DHT.
        announcer: of this server, started.
        petals_only: offer only Petals' methods, not our own stream method.

    Attributes:
        streams: the clients' open streams, by number.
        stop_metrics: what ends the server's figures for Prometheus, if it has any.
        failure: why it serves nothing any more, though it was not stopped.
    """

    def __init__(
        self, node: SwarmNode, resources: ServerResources, dht_prefix: str, announcer: Announcer, *, petals_only: bool
    ):
        self.node, self.dht_prefix = node, dht_prefix
        self._serving: ServerResources | None = resources
        self._announcer, self._petals_only = announcer, petals_only
        self.stop_metrics: Callable[[], None] | None = None
        self.streams: dict[int, ClientStream] = {}
        self.failure: BaseException | None = None
        self._petals: PetalsMethods | None = None
        self._stream_tasks: set[asyncio.Task[None]] = set()
        self._moving: asyncio.Task[None] | None = None

    @property
    def resources(self) -> ServerResources:
        """What its clients use. Not while it moves."""
        assert self._serving is not None, "the server is moving"
        return self._serving

    @property
    def serving(self) -> ServerResources | None:
        """The same, or None while it moves."""
        return self._serving

    @property
    def span(self) -> BlockSpan:
        return self.resources.span

    @property
    def record(self) -> ServerRecord:
        """What the server announces."""
        return self._announcer.record

    async def open(self, record: ServerRecord) -> None:
        """Takes streams and announces the server. Returns when clients can find it.

        Args:
            record: to announce.

        Raises:
            SwarmConnectionError: no peer took the record.
        """
        self._petals = petals = PetalsMethods(self.resources, self.dht_prefix, self.node.p2p)
        await petals.register()
        for name, serve in self._stream_methods(petals).items():
            await self.node.p2p.add_binary_stream_handler(name, partial(self._handle_stream, serve))
        self._announcer.record, self._announcer.resources = record, self.resources
        if not await self._announcer.announce():
            raise SwarmConnectionError(
                f"the swarm took no record of {self.dht_prefix!r}: check that this machine's clock is right and its "
                "peers answer"
            )

    @property
    def is_alive(self) -> bool:
        """Whether its peer runs and, if it moved, found blocks to serve."""
        return self.node.is_alive and self.failure is None

    def keep_moving(self, mover: Coroutine[Any, Any, None]) -> None:
        """Runs what moves the server, until that fails or the server stops. For the node's loop."""
        self._moving = asyncio.create_task(mover)
        self._moving.add_done_callback(self._note_failure)

    def _note_failure(self, moving: asyncio.Task[None]) -> None:
        if not moving.cancelled():
            self.failure = moving.exception()

    async def vacate(self, joining: ServerRecord, timeout: float) -> None:
        """Leaves its blocks: new clients stay away at once, and clients that use it may go on for `timeout` seconds.

        The peer stays in the swarm, and `resume` opens the server again.

        Args:
            joining: the record to announce until then.
        """
        resources, deadline = self.resources, time.monotonic() + timeout
        await self._announcer.announce(ServerState.OFFLINE)  # also to Petals' clients, who look under these blocks
        self._announcer.record = joining
        await self._announcer.announce()
        while time.monotonic() < deadline and (resources.open_requests or len(resources.caches)):  # noqa: ASYNC110
            await asyncio.sleep(min(0.2, timeout / 10))
        await self._finish(resources, _LAST_SECONDS)
        if self._stream_tasks:  # they hold the blocks
            await asyncio.wait(self._stream_tasks, timeout=_LAST_SECONDS)
        assert self._petals is not None
        await self._petals.unregister()
        for name in self._stream_methods(self._petals):
            await self.node.p2p.remove_binary_stream_handler(name)
        self._serving = self._petals = self._announcer.resources = None
        await asyncio.to_thread(resources.compute.stop, _LAST_SECONDS)

    async def resume(self, resources: ServerResources, record: ServerRecord) -> None:
        """Opens a server that was vacated, with other resources. Raises as `open`."""
        self._serving = resources
        await self.open(record)

    def stop(self, timeout: float = 5.0) -> None:
        """Announces that it leaves, finishes open requests within `timeout` seconds, and closes everything.

        May be called again: it then does nothing.
        """
        if not self.node.is_running:
            return
        deadline = time.monotonic() + timeout
        try:
            self.node.run(self._leave(timeout))
        finally:
            if self._serving is not None:
                self._serving.compute.stop(max(0.0, deadline - time.monotonic()))
            if self.stop_metrics is not None:
                self.stop_metrics()
            self.node.close()

    async def _leave(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait([self._moving], timeout=timeout / 5)  # it may be in a call that takes long to end
        if self._serving is not None:
            self._serving.leaving = True
        await self._announcer.leave(timeout / 2)
        if self._serving is not None:
            await self._finish(self._serving, deadline - time.monotonic())

    async def _finish(self, resources: ServerResources, timeout: float) -> None:
        """Takes no new requests, and ends all streams when open requests are answered or `timeout` seconds are over."""
        resources.leaving = True
        deadline = time.monotonic() + timeout
        while resources.open_requests and time.monotonic() < deadline:  # noqa: ASYNC110 (a server stops once)
            await asyncio.sleep(0.02)
        for task in list(self._stream_tasks):
            task.cancel()
        if resources.links is not None:
            resources.links.close()

    def _stream_methods(self, petals: PetalsMethods) -> dict[str, StreamHandler]:
        methods: dict[str, StreamHandler] = {
            name: partial(petals.serve_stream, method) for name, method in petals.streams.items()
        }
        if not self._petals_only:
            methods[STREAM_METHOD] = self._serve_client
        return methods

    async def _serve_client(self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ClientStream(self.resources, self.streams, info.peer_id.to_base58(), reader, writer).serve()

    async def _handle_stream(
        self,
        serve: StreamHandler,
        info: StreamInfo,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        task, resources = asyncio.current_task(), self._serving
        assert task is not None
        # Streams beyond the limit are refused with a message, but not too many at once.
        if resources is None or len(self._stream_tasks) >= resources.limits.all_streams * 3 // 2:
            writer.close()
            return
        self._stream_tasks.add(task)
        try:
            await serve(info, reader, writer)
        except asyncio.CancelledError:
            if not resources.leaving:
                raise
        finally:
            self._stream_tasks.discard(task)
