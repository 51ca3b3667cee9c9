"""Trust, but verify: a share of requests is computed again on another server and compared.

Where two disagree, a third decides. The one that is alone with its answer is banned and named; the caller's retry then
takes the result that two agree on.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import torch

from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import disagreement, tolerance
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import PeerFailure, WrongResult

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass
class _Answer:
    peers: list[str]
    tensors: Tensors


class Auditor:
    """Args:
    view: knows who else holds the blocks.
    stats: counts audits.
    rate: share of requests to check, from 0 to 1.
    """

    def __init__(self, view: SwarmView, stats: TransferStats, rate: float):
        self._view, self._stats, self._rate = view, stats, rate
        self._random = random.Random()  # the user's seeds are for training, and a server must not foresee audits
        self._draws: dict[str, Iterator[bool]] = {}
        self._told_alone = False

    async def check(
        self,
        peer: str,
        start: int,
        end: int,
        tensors: Tensors,
        *,
        tokens: int,
        again: Callable[[list[RouteSpan]], Awaitable[Tensors]],
    ) -> None:
        """Maybe checks what a server answered for blocks [start, end).

        Args:
            peer: who answered.
            tensors: the answer.
            tokens: size of the request.
            again: computes the same through another route.

        Raises:
            WrongResult: two other servers agree on another answer.
        """
        if self._rate == 0 or not next(self._draws.setdefault(peer, stratified(self._rate, self._random))):
            return
        first = _Answer([peer], tensors)
        second = await self._ask(start, end, tokens, again, avoid=[peer])
        if second is None:
            if not self._told_alone:
                self._told_alone = True
                logger.warning("audit_rate: nobody else holds blocks %d:%d, so they cannot be audited", start, end)
            return
        self._stats.audits += 1
        if (error := self._error(first, second)) is None:
            return
        third = await self._ask(start, end, tokens, again, avoid=[*first.peers, *second.peers])
        if third is None:
            logger.warning(
                "audit: servers %s and %s differ by %.2g (relative) on blocks %d:%d, and there is no third to decide",
                peer, ", ".join(second.peers), error, start, end,
            )  # fmt: skip
            return
        if self._error(second, third) is None:
            raise WrongResult(peer, f"lies: its result is {error:.2g} (relative) off that of two others", proven=True)
        if self._error(first, third) is None:
            for liar in second.peers:  # of several in a row it cannot be said which: none is banned for good
                words = f"lies: its result is {error:.2g} (relative) off that of two others"
                self._view.report_failure(WrongResult(liar, words, proven=len(second.peers) == 1))
            return
        logger.warning("audit: no two of servers %s agree", ", ".join([*first.peers, *second.peers, *third.peers]))

    async def _ask(
        self,
        start: int,
        end: int,
        tokens: int,
        again: Callable[[list[RouteSpan]], Awaitable[Tensors]],
        *,
        avoid: list[str],
    ) -> _Answer | None:
        """An answer from servers not in `avoid`; None if nobody can give one."""
        while (route := self._view.other_route(start, end, tokens=tokens, avoid=avoid)) is not None:
            try:
                return _Answer([leg.peer_id for leg in route], await again(route))
            except PeerFailure as e:
                self._view.report_failure(e)
        return None

    def _error(self, one: _Answer, other: _Answer) -> float | None:
        """How far two answers are apart (relative), None within tolerance."""
        peers = [*one.peers, *other.peers]
        dtypes = [*map(self._view.wire_dtype, peers), *map(self._view.compute_dtype, peers)]
        error = disagreement(one.tensors, other.tensors)
        return error if error > tolerance(*dtypes) else None


def stratified(rate: float, generator: random.Random) -> Iterator[bool]:
    """Draws a share `rate` of a server's requests, one at a random place in every 1 / rate."""
    position, stratum, point = 0.0, 0, generator.random()
    while True:
        position += rate
        drawn = position > point
        while position > point:
            stratum, point = stratum + 1, stratum + 1 + generator.random()
        yield drawn
