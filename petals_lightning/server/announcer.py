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
        resources: of the server; each announcement says how much of its cache is left.
        period: seconds between announcements; records live twice as long.
    """

    def __init__(
        self,
        directory: SwarmDirectory,
        entry: ModelEntry,
        record: ServerRecord,
        resources: ServerResources,
        period: float,
    ):
        self._directory, self._entry, self.record = directory, entry, record
        self._resources, self._period = resources, period

    async def announce(self, state: ServerState = ServerState.ONLINE) -> bool:
        """Stores the record, and the model's entry while the server is online; returns whether peers took it."""
        lifetime = max(2 * self._period, 3.0)
        if state is ServerState.ONLINE:
            await self._directory.announce_model(self._entry, lifetime)
        record = replace(self.record, state=state, cache_tokens_left=self._resources.cache_tokens_left)
        return await self._directory.announce(self._entry.dht_prefix, record, lifetime)

    async def announce_forever(self) -> None:
        """Announces the server once a period, and drops expired graphs and sessions."""
        while True:
            await asyncio.sleep(self._period)
            self._resources.graphs.expire()
            self._resources.caches.expire()
            try:
                # hivemind waits forever for a daemon that has died.
                async with asyncio.timeout(max(self._period, 10.0)):
                    stored = await self.announce()
            except DAEMON_ERRORS as e:  # an error must not end this task: the server would become invisible
                logger.debug("announcing failed", exc_info=e)
                stored = False
            if not stored:
                logger.warning("the swarm did not take this announcement; trying again in %gs", self._period)
