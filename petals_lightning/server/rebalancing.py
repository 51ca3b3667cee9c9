"""Moves a running server to where the swarm is thin: looks, waits, announces, looks again, moves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

from petals_lightning.server.announcer import DAEMON_ERRORS, Announcer
from petals_lightning.server.placement import Span, placed_servers, planned_span
from petals_lightning.swarm import SwarmDirectory
from petals_lightning.swarm.directory import ModelEntry

logger = logging.getLogger(__name__)

STAY_PERIODS = 5  # after loading; bounds how often a server moves, whatever the swarm does
MAX_SETTLE = 10.0  # seconds in which announcements reach all peers


class Rebalancer:
    """Decides when one server moves. For the node's event loop.

    Servers that see the same swarm compute the same plan of moves, and only those that it names move. Each waits for a
    random time and looks again, so most see what others have done. Then it announces its move, waits until others can
    have seen that, and looks once more: of two that have chosen one hole, one withdraws.

    Args:
        directory: of the swarm.
        entry: the model.
        announcer: of this server.
        move: drains the server, loads other blocks and announces them.
        peer: the server's base58 id.
        quality, period: `ServerConfig.balance_quality`, `balance_period`.
    """

    def __init__(
        self,
        directory: SwarmDirectory,
        entry: ModelEntry,
        announcer: Announcer,
        move: Callable[[Span], Awaitable[None]],
        *,
        peer: str,
        quality: float,
        period: float,
    ):
        self._directory, self._entry, self._announcer, self._move = directory, entry, announcer, move
        self._peer, self._quality, self._period = peer, quality, period
        self._settle = min(MAX_SETTLE, period / 4)
        self._random = random.Random()

    async def run(self) -> None:
        """Looks again and again. Ends with the error of `move`, if that fails."""
        while True:
            await asyncio.sleep(STAY_PERIODS * self._period)
            await self._announce(can_move=True)
            span = None
            while span is None:
                await asyncio.sleep(self._period * self._random.uniform(0.5, 1.5))
                span = await self._decide()
            await self._move(span)

    async def _decide(self) -> Span | None:
        """The span to move to now, announced, or None."""
        if await self._planned() is None:
            return None
        await asyncio.sleep(self._random.uniform(0, self._period / 4))
        if (span := await self._planned()) is None:
            return None
        await self._announce(next_start=span[0], next_end=span[1])
        await asyncio.sleep(self._settle)
        if await self._planned(announced=span) == span:
            return span
        logger.info("not moving to blocks %d:%d: another server does, or the swarm has changed", *span)
        await self._announce(next_start=None, next_end=None)
        return None

    async def _planned(self, announced: Span | None = None) -> Span | None:
        """Where the plan has this server now; None if it stays or the swarm cannot be read."""
        count = self._entry.num_blocks
        try:
            async with asyncio.timeout(max(self._period, 10.0)):
                servers = placed_servers(await self._directory.servers(self._entry.dht_prefix, count))
        except DAEMON_ERRORS as e:
            logger.debug("the swarm could not be read", exc_info=e)
            return None
        span = await asyncio.to_thread(planned_span, servers, self._peer, count, self._quality, announced)
        logger.debug("of %d servers this one is planned to move to %s", len(servers), span)
        return span

    async def _announce(self, **changes: object) -> None:
        """Changes the record; the next regular announcement repeats it if this one fails."""
        self._announcer.record = replace(self._announcer.record, **changes)  # type: ignore[arg-type]
        try:
            await self._announcer.announce()
        except DAEMON_ERRORS as e:
            logger.debug("announcing failed", exc_info=e)
