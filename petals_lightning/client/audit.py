"""Trust, but verify: a share of requests is computed again on another server and compared.

Where two disagree, only a judge decides: a server that the user trusts, or this machine, which computes the blocks
itself if it has them on its disk. What other strangers say proves nothing, since they may lie alike. Whom the judge
contradicts is banned and named. Without a judge both are left alone for a while, and the part runs again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import torch

from petals_lightning.client.legs import Leg
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import disagreement, tolerance
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import ConfigurationError, PeerFailure, WrongResult

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Grads = tuple[torch.Tensor, torch.Tensor | None]
Judge = Callable[[Leg, torch.Tensor | None, Grads | None], Tensors]
"""What a leg gives, from its deep prompts and, in backward, the gradients of its outputs. Raises ConfigurationError."""


@dataclass(eq=False)
class _Answer:
    peers: list[str]
    tensors: Tensors


class Auditor:
    """Has a share of requests computed again elsewhere, and compares.

    Args:
        view: knows who else holds the blocks, who is trusted, and what share of requests to check.
        stats: counts audits.
        judge: computes blocks on this machine, if it can.
    """

    def __init__(self, view: SwarmView, stats: TransferStats, judge: Judge | None):
        self._view, self._stats, self._judge = view, stats, judge
        self._random = random.Random()  # the user's seeds are for training, and a server must not foresee audits
        self._draws: dict[str, Iterator[bool]] = {}
        self._judging = asyncio.Lock()  # micro-batches of a step may all meet the same liar
        self._told_alone = False

    async def check(
        self,
        leg: Leg,
        deep: torch.Tensor | None,
        grads: Grads | None,
        tensors: Tensors,
        again: Callable[[list[RouteSpan]], Awaitable[Tensors]],
    ) -> None:
        """Maybe checks what a server answered for its leg.

        Args:
            leg: names the server.
            deep: [n, P, H] prompts of the leg's blocks, or None.
            grads: of its outputs; None: it is a forward.
            tensors: the answer.
            again: computes the same through another route.

        Raises:
            WrongResult: a judge found another answer; or another server did, and there is no judge.
        """
        rate = self._view.config.audit_rate
        if rate == 0 or self._view.is_trusted(leg.peer):
            return
        if not next(self._draws.setdefault(leg.peer, stratified(rate, self._random))):
            return
        first, second = _Answer([leg.peer], tensors), await self._ask(leg, again)
        if second is None:
            if not self._told_alone:
                self._told_alone = True
                logger.warning(
                    "audit_rate: nobody else holds blocks %d:%d, so they cannot be audited", leg.start, leg.end
                )
            return
        self._stats.audits += 1
        if (error := self._error(first, second)) is None:
            return
        if all(map(self._view.is_trusted, second.peers)):
            raise WrongResult(leg.peer, _words(error, "that of a trusted server"), proven=True)
        async with self._judging:
            if self._view.is_proven_liar(leg.peer):
                raise WrongResult(leg.peer, _words(error, "that of another server"), proven=True)
            if not any(map(self._view.is_proven_liar, second.peers)):
                await self._decide(leg, deep, grads, first, second, error)

    async def _ask(self, leg: Leg, again: Callable[[list[RouteSpan]], Awaitable[Tensors]]) -> _Answer | None:
        """An answer from others; None if nobody can give one."""
        while route := self._view.auditing_route(leg.start, leg.end, avoid=leg.peer, generator=self._random):
            try:
                return _Answer([part.peer_id for part in route], await again(route))
            except PeerFailure as e:
                self._view.report_failure(e)
        return None

    async def _decide(
        self, leg: Leg, deep: torch.Tensor | None, grads: Grads | None, first: _Answer, second: _Answer, error: float
    ) -> None:
        """Reports whom the judge contradicts. Raises WrongResult if that is the first, or if there is no judge."""
        try:
            truth = await self._compute(leg, deep, grads)
        except ConfigurationError as e:
            logger.warning(
                "audit: servers %s and %s differ by %.2g (relative) on blocks %d:%d, and there is no judge (%s). Put "
                "the model on this machine's disk, or name servers that you trust as trusted_servers",
                leg.peer, ", ".join(second.peers), error, leg.start, leg.end, e,
            )  # fmt: skip
            words = "disagrees with another server, and there is no judge"
            wrong = {leg.peer: WrongResult(leg.peer, words), **{p: WrongResult(p, words) for p in second.peers}}
        else:
            off = {answer: found for answer in (first, second) if (found := self._error(answer, truth)) is not None}
            worst = max(off, key=lambda answer: off[answer], default=None)
            wrong = {
                # Rounding may take an honest one off the truth; and of several in a row it cannot be said which lied.
                peer: WrongResult(peer, _words(off[answer]), proven=answer is worst and len(answer.peers) == 1)
                for answer in off
                for peer in answer.peers
            }
        for peer in second.peers:
            if peer in wrong:
                self._view.report_failure(wrong[peer])
        if leg.peer in wrong:
            raise wrong[leg.peer]

    async def _compute(self, leg: Leg, deep: torch.Tensor | None, grads: Grads | None) -> _Answer:
        """What this machine computes, by nobody. Raises ConfigurationError if it cannot."""
        if self._judge is None:
            raise ConfigurationError("this client has no checkpoint")
        return _Answer([], await asyncio.to_thread(self._judge, leg, deep, grads))

    def _error(self, one: _Answer, other: _Answer) -> float | None:
        """How far two answers are apart (relative), None within tolerance."""
        peers = [*one.peers, *other.peers]
        dtypes = [*map(self._view.wire_dtype, peers), *map(self._view.compute_dtype, peers)]
        error = disagreement(one.tensors, other.tensors)
        return error if error > tolerance(*dtypes) else None


def _words(error: float, other: str = "what this machine computes") -> str:
    return f"lies: its result is {error:.2g} (relative) off {other}"


def stratified(rate: float, generator: random.Random) -> Iterator[bool]:
    """Draws a share `rate` of a server's requests, one at a random place in every 1 / rate."""
    position, stratum, point = 0.0, 0, generator.random()
    while True:
        position += rate
        drawn = position > point
        while position > point:
            stratum, point = stratum + 1, stratum + 1 + generator.random()
        yield drawn
