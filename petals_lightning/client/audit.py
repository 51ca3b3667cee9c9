"""Audits: a share of requests is computed again on another server and compared.

If two servers disagree, only a judge decides: a server that the user trusts, or this machine, which computes the blocks
itself if its disk has them. Other servers prove nothing, since they may collude. A server that the judge contradicts is
banned and reported. Without a judge both servers are banned for a while, and the blocks run again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from petals_lightning.client.router import Router
from petals_lightning.client.routing import RouteSpan
from petals_lightning.client.segment_requests import Grads, Tensors
from petals_lightning.client.segments import Segment
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.validation import disagreement, tolerance
from petals_lightning.errors import ConfigurationError, PeerFailure, WrongResult
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.quant_types import QUANT_TYPES, UNQUANTIZED

logger = logging.getLogger(__name__)

Judge = Callable[[Segment, Adapter | None, Grads | None, str], Tensors]
"""Computes a segment from its inputs, its adapter and, in backward, gradients of its outputs, with weights of a kind.

Raises ConfigurationError.
"""


@dataclass(eq=False)
class _Answer:
    peers: list[str]
    tensors: Tensors
    quant_types: set[str]
    """Of the weights that it was computed with."""

    @property
    def judged_with(self) -> str:
        """The kind of weights with which this machine computes the same; not quantised if they are of several kinds."""
        is_one_of_ours = len(self.quant_types) == 1 and self.quant_types <= set(QUANT_TYPES)
        return next(iter(self.quant_types)) if is_one_of_ours else UNQUANTIZED


class Auditor:
    """Repeats a share of requests on another server and compares the results.

    Args:
        servers: tells which servers are trusted, and the share of requests to audit.
        router: finds other servers that hold the blocks.
        stats: counts audits.
        judge: computes blocks on this machine; None if it cannot.
    """

    def __init__(self, servers: ServerPool, router: Router, stats: TransferStats, judge: Judge | None):
        self._servers, self._router, self._stats, self._judge = servers, router, stats, judge
        self._random = random.Random()  # the user's seeds are for training, and a server must not foresee audits
        self._draws: dict[str, Iterator[bool]] = {}
        self._judging = asyncio.Lock()  # micro-batches of a step may all meet the same liar
        self._warned_unaudited = False

    async def check(
        self,
        segment: Segment,
        adapter: Adapter | None,
        grads: Grads | None,
        tensors: Tensors,
        recompute: Callable[[list[RouteSpan]], Awaitable[Tensors]],
    ) -> None:
        """Audits a server's answer, if this request is drawn.

        Args:
            segment: a segment of that server only.
            adapter: of the segment's blocks, or None.
            grads: gradients of the outputs; None for a forward.
            tensors: the answer.
            recompute: computes the same thing on another route.

        Raises:
            WrongResult: a judge got another answer, or another server did and there is no judge.
        """
        (peer,), rate = segment.peers, self._servers.config.audit_rate
        if self._servers.is_trusted(peer):
            return
        if not next(self._draws.setdefault(peer, stratified(rate, self._random))):
            return
        first, second = self._answer([peer], tensors), await self._ask(segment, recompute)
        if second is None:
            if not self._warned_unaudited:
                self._warned_unaudited = True
                logger.warning(
                    "audit_rate: no other server holds blocks %d:%d, so they cannot be audited",
                    segment.start,
                    segment.end,
                )
            return
        self._stats.audits += 1
        if (error := self._error(first, second)) is None:
            return
        if all(map(self._servers.is_trusted, second.peers)):
            raise WrongResult(peer, _lie(error, "that of a trusted server"), proven=True)
        async with self._judging:
            if self._servers.is_proven_wrong(peer):
                raise WrongResult(peer, _lie(error, "that of another server"), proven=True)
            if not any(map(self._servers.is_proven_wrong, second.peers)):
                await self._decide(segment, adapter, grads, first, second, error)

    async def _ask(
        self, segment: Segment, recompute: Callable[[list[RouteSpan]], Awaitable[Tensors]]
    ) -> _Answer | None:
        """The answer of other servers; None if none of them can give one."""
        while route := self._router.auditing_route(
            segment.start, segment.end, avoid=segment.peers[0], generator=self._random
        ):
            try:
                return self._answer([part.peer_id for part in route], await recompute(route))
            except PeerFailure as e:
                self._servers.report_failure(e)
        return None

    async def _decide(
        self,
        segment: Segment,
        adapter: Adapter | None,
        grads: Grads | None,
        first: _Answer,
        second: _Answer,
        error: float,
    ) -> None:
        """Bans servers that the judge contradicts. Raises WrongResult for the audited server, or without a judge."""
        own = segment.peers[0]
        try:
            truths = {
                quant_type: await self._compute(segment, adapter, grads, quant_type)
                for quant_type in {first.judged_with, second.judged_with}
            }
        except ConfigurationError as e:
            logger.warning(
                "audit: servers %s and %s differ by %.2g (relative) on blocks %d:%d, and there is no judge (%s). Put "
                "the model on this machine's disk, or name servers that you trust as trusted_servers",
                own, ", ".join(second.peers), error, segment.start, segment.end, e,
            )  # fmt: skip
            reason = "disagrees with another server, and there is no judge"
            wrong = {own: WrongResult(own, reason), **{p: WrongResult(p, reason) for p in second.peers}}
        else:
            off = {
                answer: distance
                for answer in (first, second)
                if (distance := self._error(answer, truths[answer.judged_with])) is not None
            }
            worst = max(off, key=lambda answer: off[answer], default=None)
            wrong = {
                # Rounding may explain the error. In a chain of several servers, the lying one cannot be identified.
                peer: WrongResult(peer, _lie(off[answer]), proven=answer is worst and len(answer.peers) == 1)
                for answer in off
                for peer in answer.peers
            }
        for peer in second.peers:
            if peer in wrong:
                self._servers.report_failure(wrong[peer])
        if own in wrong:
            raise wrong[own]

    def _answer(self, peers: list[str], tensors: Tensors) -> _Answer:
        return _Answer(peers, tensors, set(map(self._servers.quant_type, peers)))

    async def _compute(
        self, segment: Segment, adapter: Adapter | None, grads: Grads | None, quant_type: str
    ) -> _Answer:
        """The answer that this machine computes with weights of a kind. Raises ConfigurationError if it cannot."""
        if self._judge is None:
            raise ConfigurationError("this client has no checkpoint")
        return _Answer([], await asyncio.to_thread(self._judge, segment, adapter, grads, quant_type), {quant_type})

    def _error(self, one: _Answer, other: _Answer) -> float | None:
        """The relative error between two answers; None within tolerance."""
        peers = [*one.peers, *other.peers]
        dtypes = [*map(self._servers.wire_dtype, peers), *map(self._servers.compute_dtype, peers)]
        error = disagreement(one.tensors, other.tensors)
        return error if error > tolerance(dtypes, one.quant_types | other.quant_types) else None


def _lie(error: float, other: str = "what this machine computes") -> str:
    return f"lies: its result is {error:.2g} (relative) off {other}"


def stratified(rate: float, generator: random.Random) -> Iterator[bool]:
    """Draws a share `rate` of a server's requests: a random one of every 1 / rate."""
    position, stratum, point = 0.0, 0, generator.random()
    while True:
        position += rate
        drawn = position > point
        while position > point:
            stratum, point = stratum + 1, stratum + 1 + generator.random()
        yield drawn
