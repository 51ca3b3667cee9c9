"""Announces a server in the DHT, again and again until it leaves."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.server.resources import ServerResources
from petals_lightning.swarm import SwarmDirectory
from petals_lightning.swarm.directory import ModelEntry

logger = logging.getLogger(__name__)

DAEMON_ERRORS = (OSError, EOFError, P2PDaemonError, ControlFailure)
"""Errors of calls to a daemon that may have died. TimeoutError is an OSError."""


class Announcer:
    """Stores the records of one server. For the node's event loop.

    Args:
        directory: of the swarm.
        entry: the model.
        record: the server's.
        period: seconds between announcements; records live twice as long.

    Attributes:
        record: what is announced from now on.
        resources: of the server; each announcement says how much of its cache is left. None while it loads blocks.
    """

    def __init__(self, directory: SwarmDirectory, entry: ModelEntry, record: ServerRecord, period: float):
        self._directory, self._entry, self.record, self._period = directory, entry, record, period
        self.resources: ServerResources | None = None
        self._announcing: asyncio.Task[None] | None = None

    async def announce(self, state: ServerState | None = None) -> bool:
        """Stores the record, and the model's entry while the server is online; returns whether peers took it.

        Args:
            state: instead of the record's.
        """
        lifetime = max(2 * self._period, 3.0)
        left = self.resources.cache_tokens_left if self.resources is not None else None
        record = replace(self.record, state=self.record.state if state is None else state, cache_tokens_left=left)
        if record.state is ServerState.ONLINE:
            await self._directory.announce_model(self._entry, lifetime)
        return await self._directory.announce(self._entry.dht_prefix, record, lifetime)

    async def start(self) -> bool:
        """Announces the server now and once a period; returns whether peers took the first record."""
        self._announcing = asyncio.create_task(self.announce_forever())
        return await self.announce()

    async def leave(self, timeout: float) -> None:
        """Announces once, within `timeout` seconds, that the server has left. May be called again: it does nothing."""
        announcing, self._announcing = self._announcing, None
        if announcing is None:
            return
        announcing.cancel()
        await asyncio.wait([announcing])
        try:
            async with asyncio.timeout(timeout):
                await self.announce(ServerState.OFFLINE)
        except DAEMON_ERRORS:
            logger.warning("no peer took the message that this server leaves; its record expires by itself")

    async def announce_forever(self) -> None:
        """Announces the server once a period, and drops expired graphs and sessions."""
        while True:
            await asyncio.sleep(self._period)
            if self.resources is not None:
                self.resources.graphs.expire()
                self.resources.caches.expire()
            try:
                # hivemind waits forever for a daemon that has died.
                async with asyncio.timeout(max(self._period, 10.0)):
                    stored = await self.announce()
            except DAEMON_ERRORS as e:  # an error must not end this task: the server would become invisible
                logger.debug("announcing failed", exc_info=e)
                stored = False
            if not stored:
                logger.warning("the swarm did not take this announcement; trying again in %gs", self._period)
