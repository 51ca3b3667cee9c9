"""Routes through a pool of servers: which server runs which blocks, and the size of micro-batches."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Collection

from petals_lightning.client.handover import HandoverPolicy
from petals_lightning.client.routing import RouteSpan, ServerSpan, format_blocks, plan_route, route_seconds, uncovered
from petals_lightning.client.servers import ServerPool
from petals_lightning.errors import IncompatibleServerError, NoServersError, PeerFailure

logger = logging.getLogger(__name__)

_REROUTE_GAIN = 0.2  # a route replaces the one in use only if it is faster by this share
_MICROBATCHES_PER_SERVER = 4  # Huang et al. 2019, GPipe, section 2.3: idle time is small from 4 per stage on
_NEAR = 0.01  # round trip in seconds below which splitting a batch for one server costs more than it saves


class Router:
    """Plans routes. All methods belong to the node's loop.

    Args:
        servers: the pool, started.

    Attributes:
        handover: which servers may hand requests over to each other.
    """

    def __init__(self, servers: ServerPool):
        self._servers, self._config = servers, servers.config
        self.handover = HandoverPolicy(servers.config)
        self._routes: dict[tuple[int, int], list[RouteSpan]] = {}

    async def connect(self) -> None:
        """Opens connections along a route through all blocks. This finds dead records and measures round trips.

        Raises:
            NoServersError: no usable server holds some block.
            IncompatibleServerError: all servers that hold some block serve another model under this name.
            AccessDeniedError: every server that holds some block refuses this peer.
        """
        blocks = 0, self._servers.num_blocks
        if missing := uncovered(self._spans(1), *blocks):
            if incompatible := self._servers.incompatible_at(missing):
                raise IncompatibleServerError(incompatible[0])
            raise NoServersError(await self._servers.explain_missing(missing))
        while True:
            try:
                for leg in await self.route(*blocks, tokens=1024):
                    await self._servers.connection(leg.peer_id)
                return
            except PeerFailure as e:
                self._servers.report_failure(e)

    async def route(self, start: int, end: int, *, tokens: int, avoid: Collection[str] = ()) -> list[RouteSpan]:
        """The fastest route through blocks [start, end) for requests of `tokens` tokens.

        Waits up to `recovery_timeout` seconds for blocks whose servers have all failed. With peers to `avoid`, it
        never waits: it takes a route without them, or raises.

        Raises:
            NoServersError: no server came back, or there are only servers to avoid.
            SwarmConnectionError: this process is cut off, because its daemon has ended.
            AccessDeniedError: every server that holds the blocks refuses this peer.
        """
        servers, deadline, warned = self._servers, time.monotonic() + self._config.recovery_timeout, False
        while True:
            spans = [span for span in self._spans(tokens) if span.peer not in avoid]
            if (route := plan_route(spans, start, end)) is not None:
                return route if avoid else self._settle(spans, start, end, route)
            servers.node.check_alive()
            missing = uncovered(spans, start, end)
            servers.check_refusals(missing)
            if avoid:
                raise NoServersError(f"no other server holds blocks {format_blocks(missing)} of {servers.dht_prefix!r}")
            if time.monotonic() > deadline:
                raise NoServersError(await servers.explain_missing(missing))
            if not warned:
                warned = True
                logger.warning(
                    "blocks %s of %s have no server left; waiting up to %.0f s for one",
                    format_blocks(missing), servers.dht_prefix, self._config.recovery_timeout,
                )  # fmt: skip
            servers.shorten_bans(missing)
            await asyncio.sleep(0.5)
            await servers.node.meet_again()
            await servers.refresh()

    def other_route(self, start: int, end: int, *, tokens: int, avoid: Collection[str]) -> list[RouteSpan] | None:
        """The fastest route through blocks [start, end) without the servers `avoid`, or None; never waits."""
        return plan_route([span for span in self._spans(tokens) if span.peer not in avoid], start, end)

    def auditing_route(self, start: int, end: int, *, avoid: str, generator: random.Random) -> list[RouteSpan] | None:
        """Random servers to compute blocks [start, end) again, without the server `avoid`, or None; never waits.

        Trusted servers come first, then those whose weights are of the same kind. All others are equally likely,
        so that a server cannot become everybody's auditor by claiming to be fast.
        """
        drawn = [  # a hop costs from 1 to 2, so one server that holds all blocks is preferred to a chain
            ServerSpan(span.peer, span.start, span.end, 1 + generator.random(), 0.0)
            for span in self._spans(1)
            if span.peer != avoid
        ]
        trusted = [span for span in drawn if self._servers.is_trusted(span.peer)]
        quant_type = self._servers.quant_type(avoid)
        alike = [span for span in drawn if self._servers.quant_type(span.peer) == quant_type]
        return next((route for some in (trusted, alike, drawn) if (route := plan_route(some, start, end))), None)

    def others_hold(self, start: int, end: int, peer: str) -> bool:
        """Whether other servers hold blocks [start, end); they may be banned now."""
        others = [other for other in self._servers.may_be_used() if other != peer]
        spans = [
            ServerSpan(other, *self._servers.spans[other], 0.0, 0.0)
            for other in others
            if not self._servers.is_proven_wrong(other)
        ]
        return plan_route(spans, start, end) is not None

    def expected_seconds(self, peer: str, *, tokens: int, blocks: int) -> tuple[float, bool]:
        """Expected seconds of a forward on a server, and whether they are measured or the server's own claim."""
        hop, rate = self._servers.speed(peer)
        return hop + tokens * blocks / rate, peer in self._servers.speeds.by_peer

    def microbatch_size(self, route: list[RouteSpan], batch: int, tokens: int, prefix: int) -> int:
        """Samples of [batch, tokens, H], after a prefix of `prefix` positions, to send in one micro-batch."""
        is_near = len(route) == 1 and (self._servers.round_trip(route[0].peer_id) or 0.0) < _NEAR
        limits = [self._servers.max_batch_tokens(leg.peer_id) for leg in route]
        most = min([self._config.max_microbatch_tokens, *(limit for limit in limits if limit is not None)])
        return microbatch_size(
            batch,
            1 if is_near else _MICROBATCHES_PER_SERVER * len(route),
            smallest=math.ceil(self._config.min_microbatch_tokens / tokens),
            largest=most // (tokens + prefix),
        )

    def _spans(self, tokens: int) -> list[ServerSpan]:
        """The usable servers with their blocks, and the cost of a request of `tokens` tokens on each."""
        spans = []
        for peer in self._servers.usable():
            hop, rate = self._servers.speed(peer)
            # A server that does not answer pings may hang. Until that is known, others are preferred.
            hop += self._servers.silence(peer)
            spans.append(ServerSpan(peer, *self._servers.spans[peer], hop, tokens / rate))
        return spans

    def _settle(self, spans: list[ServerSpan], start: int, end: int, planned: list[RouteSpan]) -> list[RouteSpan]:
        """The last route while it is about as fast as the planned one: its servers have our prompts and streams."""
        last = self._routes.get((start, end), [])
        now, then = route_seconds(spans, planned), route_seconds(spans, last)
        assert now is not None
        if not last or then is None or now < then * (1 - _REROUTE_GAIN):
            last = [
                RouteSpan(leg.peer_id, leg.start, leg.end, self._servers.public_name(leg.peer_id)) for leg in planned
            ]
            self._routes[start, end] = last
        return list(last)


def microbatch_size(batch: int, count: int, *, smallest: int, largest: int) -> int:
    """The size of each of about `count` micro-batches: from `smallest` to `largest`, as equal as possible."""
    size = min(max(math.ceil(batch / count), smallest, 1), max(largest, 1))
    return math.ceil(batch / math.ceil(batch / size))
