"""What a client knows of the servers of one model: who holds what, how fast, and whom to leave alone."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from petals_lightning import __version__
from petals_lightning.client.config import ClientConfig
from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.handover import HandoverPolicy
from petals_lightning.client.pace import DEFAULT_HOP_SECONDS, Paces
from petals_lightning.client.petals_connection import PetalsConnection
from petals_lightning.client.routing import RouteSpan, ServerSpan, format_blocks, plan_route, route_seconds, uncovered
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.client.sizing import Stage, microbatch_size
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import (
    AccessDeniedError,
    IncompatibleServerError,
    NoServersError,
    PeerFailure,
    WrongResult,
)
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.tensors import INT8_BLOCKWISE
from petals_lightning.swarm import SwarmDirectory, SwarmNode

logger = logging.getLogger(__name__)

_DEFAULT_TOKENS_PER_SECOND = 1000.0
_DEFAULT_REQUEST_SECONDS, _MAX_REQUEST_SECONDS = 0.01, 10.0  # where a server says nothing, or nonsense
_TRUST_IN_CLAIMS = 0.5  # servers announce the speed that they had when idle; measured speeds count in full
_MAX_BAN = 300.0
_LIAR_BAN = 86400.0  # a server that a judge has contradicted has had its chance
_MODELS_TOLD = 20  # in an error; anybody may list thousands
_WORTH_A_CHANGE = 0.2  # a route must be faster by this share to take the place of the one in use


@dataclass
class _Ban:
    until: float
    count: int
    is_proven: bool
    reason: str


class SwarmView:
    """The servers of one model. Everything but the constructor belongs to the node's loop.

    A server that fails leaves the view at once. It comes back when, after its ban, a connection in the background
    succeeds: a record that lives on in the DHT never costs a step again.

    Args:
        node: this process's peer, started.
        dht_prefix, num_blocks, hidden_size: the model.
        fingerprint: of the model's weights here; servers that state another one are not used.
        sliding_window: how far back the model's attention reaches, padding counted; None: to the first position.
        config: timeouts and filters.
        stats: counts bytes and retries.
    """

    def __init__(
        self,
        node: SwarmNode,
        *,
        dht_prefix: str,
        num_blocks: int,
        hidden_size: int,
        fingerprint: str | None,
        sliding_window: int | None,
        config: ClientConfig,
        stats: TransferStats,
    ):
        self.node, self.dht_prefix, self.num_blocks, self.config = node, dht_prefix, num_blocks, config
        self.handover, self.paces = HandoverPolicy(config), Paces()
        self._hidden_size, self._fingerprint, self._stats = hidden_size, fingerprint, stats
        self._window = sliding_window
        self._directory = SwarmDirectory(node, config.swarm_token)
        self._spans: dict[str, tuple[int, int]] = {}
        self._records: dict[str, ServerRecord] = {}
        self._misfits: dict[str, str] = {}
        self._refusals: dict[str, str] = {}
        self._bans: dict[str, _Ban] = {}
        self._routes: dict[tuple[int, int], list[RouteSpan]] = {}
        self._connections: dict[str, ServerConnection] = {}
        self._opening: dict[str, asyncio.Task[ServerConnection]] = {}
        self._maintenance: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the records and connects to a first route.

        Raises:
            NoServersError: some block is held by nobody who may be used.
            IncompatibleServerError: all that hold some block serve another model under this name.
            AccessDeniedError: every server that holds some block refuses this peer.
        """
        await self.refresh()
        missing = uncovered(self._usable(1), 0, self.num_blocks)
        if missing:
            if misfits := self._misfits_at(missing):
                raise IncompatibleServerError(misfits[0])
            raise NoServersError(await self._explain_missing(missing))
        self._maintenance = asyncio.create_task(self._maintain())
        try:
            await self._connect_first_route()
        except BaseException:
            await self.close()
            raise

    async def _connect_first_route(self) -> None:
        # Connecting now finds dead records before the first step, and measures the way to each server.
        while True:
            try:
                for leg in await self.route(0, self.num_blocks, tokens=1024):
                    await self.connection(leg.peer_id)
                return
            except PeerFailure as e:
                self.report_failure(e)

    async def close(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
        for task in self._opening.values():
            task.cancel()
        for connection in list(self._connections.values()):
            connection.close()
        self._connections.clear()

    async def refresh(self) -> None:
        """Reads the records anew."""
        table = await self._directory.servers(self.dht_prefix, self.num_blocks)
        spans: dict[str, tuple[int, int]] = {}
        records: dict[str, ServerRecord] = {}
        gone: set[str] = set()
        for block, found in enumerate(table):
            for peer, record in found.items():
                if record.state is not ServerState.ONLINE:
                    gone.add(peer)
                    continue
                first, end = spans.get(peer, (block, block))
                if end == block:  # a span is contiguous; blocks behind a gap are leftovers of an earlier one
                    spans[peer] = (first, block + 1)
                    records[peer] = record
        # A directory without a record of a server proves nothing; an open stream does, also when it ends.
        for peer, connection in self._connections.items():
            if peer in self._spans and peer not in gone and peer not in spans and connection.is_open:
                spans[peer], records[peer] = self._spans[peer], self._records[peer]
        self._spans, self._records = spans, records
        self._forget_absent()
        self._misfits = {peer: why for peer, record in records.items() if (why := self._misfit(peer, record))}

    async def route(self, start: int, end: int, *, tokens: int, avoid: Collection[str] = ()) -> list[RouteSpan]:
        """The fastest route through blocks [start, end) for requests of `tokens` tokens.

        Waits up to `recovery_timeout` seconds for blocks whose every holder has failed. With peers to `avoid` it takes
        what is there without them, or raises.

        Raises:
            NoServersError: nobody came back, or only those to avoid are there.
            SwarmConnectionError: this process itself is cut off, because its daemon has ended.
            AccessDeniedError: there are servers, but all of them refuse this peer.
        """
        deadline = time.monotonic() + self.config.recovery_timeout
        told = False
        while True:
            usable = [server for server in self._usable(tokens) if server.peer not in avoid]
            if (legs := plan_route(usable, start, end)) is not None:
                return legs if avoid else self._settle(usable, start, end, legs)
            self.node.check_alive()
            missing = uncovered(usable, start, end)
            self._check_refusals(missing)
            if avoid:
                raise NoServersError(f"no other server holds blocks {format_blocks(missing)} of {self.dht_prefix!r}")
            if time.monotonic() > deadline:
                raise NoServersError(await self._explain_missing(missing))
            if not told:
                told = True
                logger.warning(
                    "blocks %s of %s have no server left; waiting up to %.0f s for one",
                    format_blocks(missing), self.dht_prefix, self.config.recovery_timeout,
                )  # fmt: skip
            await asyncio.sleep(0.5)
            await self.node.meet_again()
            await self.refresh()

    async def connection(self, peer: str) -> ServerConnection:
        """The open connection to a server, opened if need be (once, however many wait for it).

        Raises:
            PeerFailure: it cannot be opened, or the server is not what its record says.
        """
        connection = self._connections.get(peer)
        if connection is not None and connection.is_open:
            return connection
        if peer not in self._opening:
            self._opening[peer] = opening = asyncio.create_task(self._open(peer))
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # those who waited may be gone
        return await asyncio.shield(self._opening[peer])

    def report_failure(self, failure: PeerFailure) -> None:
        """Takes a server out of the view and bans it, longer every time."""
        peer = failure.peer
        if failure.code == ErrorCode.NOT_ALLOWED.value:
            self._refusals[peer] = failure.reason
        known, proven = self._bans.get(peer), isinstance(failure, WrongResult) and failure.proven
        if known is not None and known.until > time.monotonic() and (known.is_proven or not proven):
            return  # several requests in flight tell of one failure
        count = known.count + 1 if known is not None else 1
        period = _LIAR_BAN if proven else min(self.config.ban_period * 2 ** (count - 1), _MAX_BAN)
        self._bans[peer] = _Ban(time.monotonic() + period, count, proven, failure.reason)
        if failure.code is None:  # the stream or the server itself; one that merely refuses keeps its other requests
            connection = self._connections.pop(peer, None)
            if connection is not None:
                connection.close()
        # One that stays away is told of once, however often the background tries it.
        level = logging.WARNING if count == 1 or proven else logging.INFO
        logger.log(level, "%s; leaving it alone for at least %.0f s", self._named(failure), period)

    def forgive(self, peer: str) -> None:
        """Lifts a ban: the failure was not the server's."""
        if peer in self._bans and not self._bans[peer].is_proven:
            del self._bans[peer]

    def expected_seconds(self, peer: str, *, tokens: int, blocks: int) -> tuple[float, bool]:
        """What a forward on a server should take, and whether that is measured: else it is what the server claims."""
        hop, rate = self._pace(peer)
        return hop + tokens * blocks / rate, peer in self.paces.speeds

    def other_route(self, start: int, end: int, *, tokens: int, avoid: Collection[str]) -> list[RouteSpan] | None:
        """The fastest route through blocks [start, end) without the servers `avoid`, or None; never waits."""
        return plan_route([span for span in self._usable(tokens) if span.peer not in avoid], start, end)

    def auditing_route(self, start: int, end: int, *, avoid: str, generator: random.Random) -> list[RouteSpan] | None:
        """Servers drawn to compute blocks [start, end) again, without the server `avoid`, or None; never waits.

        Trusted ones come first. All others are equally likely: one that claims to be fast must not become everybody's
        auditor.
        """
        drawn = [  # a hop costs from 1 to 2, so one server that holds all is taken before a chain
            ServerSpan(span.peer, span.start, span.end, 1 + generator.random(), 0.0)
            for span in self._usable(1)
            if span.peer != avoid
        ]
        trusted = [span for span in drawn if self.is_trusted(span.peer)]
        return plan_route(trusted, start, end) or plan_route(drawn, start, end)

    def is_trusted(self, peer: str) -> bool:
        """Whether the user believes this server."""
        return peer in self.config.trusted_servers

    def is_proven_liar(self, peer: str) -> bool:
        """Whether a judge has contradicted this server."""
        return peer in self._bans and self._bans[peer].is_proven

    def others_hold(self, start: int, end: int, peer: str) -> bool:
        """Whether blocks [start, end) are held without this server, by others that may be in a ban now."""
        spans = [
            ServerSpan(other, *span, 0.0, 0.0)
            for other, span in self._spans.items()
            if other != peer and self._may_be_used(other) and not self.is_proven_liar(other)
        ]
        return plan_route(spans, start, end) is not None

    def compute_dtype(self, peer: str) -> str | None:
        """The dtype that a server says it computes in."""
        record = self._records.get(peer)
        return record.torch_dtype if record is not None else None

    def wire_dtype(self, peer: str) -> str:
        """The dtype to send to a server and to ask of it."""
        wanted, connection = self.config.wire_dtype, self._connections.get(peer)
        said = connection.info.get("wire_dtypes") if connection is not None else None
        can_quantise = isinstance(said, list) and INT8_BLOCKWISE in said
        if wanted != "auto" and (wanted != INT8_BLOCKWISE or can_quantise):
            return wanted
        record = self._records.get(peer)
        return record.torch_dtype if record is not None and record.torch_dtype in ("float16", "bfloat16") else "float32"

    def round_trip(self, peer: str) -> float:
        """Seconds of a call to a server that computes nothing."""
        connection = self._connections.get(peer)
        return (connection.round_trip if connection is not None else None) or 0.0

    def microbatch_size(self, route: list[RouteSpan], batch: int, tokens: int, prefix: int, *, deep: bool) -> int:
        """Samples to send through a route in one request, of [batch, tokens, H] behind so many positions of a prefix.

        `deep`: there are deep prompts, whose gradients every micro-batch brings home.
        """
        position_seconds = self._hidden_size * self.paces.element_seconds
        link = Stage(batch * tokens * position_seconds, prefix * position_seconds)
        stages = [stage for leg in route for stage in (link, self._server_stage(leg, batch * tokens, prefix))]
        if deep:
            stages.append(Stage(0.0, (route[-1].end - route[0].start) * prefix * position_seconds))
        said = [self._info(leg.peer_id).get("max_batch_tokens") for leg in route]
        limits = [self.config.max_microbatch_tokens, *(limit for limit in said if type(limit) is int and limit > 0)]
        smallest = math.ceil(self.config.min_microbatch_tokens / tokens)
        return microbatch_size(batch, stages, smallest=smallest, largest=min(limits) // (tokens + prefix))

    def _server_stage(self, leg: RouteSpan, tokens: int, prefix: int) -> Stage:
        """A server's time for a batch of so many tokens, and for each request besides."""
        blocks, (_, rate) = leg.end - leg.start, self._pace(leg.peer_id)
        said = self._info(leg.peer_id).get("request_seconds")
        of_request = said if isinstance(said, float) and 0 <= said < _MAX_REQUEST_SECONDS else _DEFAULT_REQUEST_SECONDS
        of_request += prefix * blocks / rate
        of_token = blocks / rate
        if (speed := self.paces.speeds.get(leg.peer_id)) is not None:  # measured on whole requests
            of_token = max(of_token - of_request / speed.request_tokens, of_token / 4)
        return Stage(tokens * of_token, of_request)

    def _info(self, peer: str) -> dict[str, Any]:
        """What a server says of itself, if we have met it."""
        connection = self._connections.get(peer)
        return connection.info if connection is not None else {}

    def _usable(self, tokens: int) -> list[ServerSpan]:
        spans = []
        for peer, (start, end) in self._spans.items():
            if peer in self._bans and not self._is_readmitted(peer):
                continue
            if not self._may_be_used(peer):
                continue
            hop, rate = self._pace(peer)
            connection = self._connections.get(peer)
            # One that does not answer pings may hang: until that is known, others are better.
            silence = connection.silence if connection is not None else 0.0
            spans.append(ServerSpan(peer, start, end, hop + silence, tokens / rate))
        return spans

    def _may_be_used(self, peer: str) -> bool:
        return peer not in self._misfits and peer not in self._refusals and self._is_allowed(peer)

    def _pace(self, peer: str) -> tuple[float, float]:
        """Seconds to get a request to a server and back, and its tokens a second of one block: measured, or claimed."""
        if (speed := self.paces.speeds.get(peer)) is not None:
            return speed.hop_seconds, speed.tokens_per_second
        record, connection = self._records.get(peer), self._connections.get(peer)
        hop = connection.round_trip if connection is not None else None
        claimed = record.tokens_per_second if record is not None else None
        rate = (claimed or _DEFAULT_TOKENS_PER_SECOND) * _TRUST_IN_CLAIMS
        return hop if hop is not None else DEFAULT_HOP_SECONDS, rate

    def _settle(self, usable: list[ServerSpan], start: int, end: int, planned: list[RouteSpan]) -> list[RouteSpan]:
        """The planned route, or the last one while it is about as fast: servers there have our prompts and streams."""
        last = self._routes.get((start, end), [])
        now, then = route_seconds(usable, planned), route_seconds(usable, last)
        assert now is not None
        if not last or then is None or now < then * (1 - _WORTH_A_CHANGE):
            names = {peer: record.public_name for peer, record in self._records.items()}
            last = [RouteSpan(leg.peer_id, leg.start, leg.end, names.get(leg.peer_id)) for leg in planned]
            self._routes[start, end] = last
        return list(last)

    def _forget_absent(self) -> None:
        """Servers come and go under new ids: of those without a record and a running ban nothing is remembered."""
        now = time.monotonic()
        self._bans = {p: ban for p, ban in self._bans.items() if p in self._spans or ban.until > now}
        self.paces.forget_absent(self._spans)
        self._refusals = {p: words for p, words in self._refusals.items() if p in self._spans}

    def _check_refusals(self, missing: list[int]) -> None:
        """Waiting does not help where the only servers of a block do not let us in."""
        for block in missing:
            holders = [peer for peer, (start, end) in self._spans.items() if start <= block < end]
            refusals = [self._refusals[peer] for peer in holders if peer in self._refusals]
            if refusals and len(refusals) == len(holders):
                raise AccessDeniedError(
                    f"block {block} of {self.dht_prefix!r} is held by {len(holders)} server(s), and none lets this "
                    f"peer in; one says: {refusals[0]}"
                )

    def _named(self, failure: PeerFailure) -> str:
        record = self._records.get(failure.peer)
        name = f" ({record.public_name})" if record is not None and record.public_name else ""
        return f"server {failure.peer}{name}: {failure.reason}"

    def _is_allowed(self, peer: str) -> bool:
        allowed = self.config.allowed_servers
        return peer not in self.config.blocked_servers and (allowed is None or peer in allowed)

    def _is_readmitted(self, peer: str) -> bool:
        ban, connection = self._bans.get(peer), self._connections.get(peer)
        is_over = ban is None or ban.until < time.monotonic()
        return is_over and connection is not None and connection.is_open

    def _misfit(self, peer: str, record: ServerRecord) -> str | None:
        name = f"server …{peer[-6:]} ({record.public_name})" if record.public_name else f"server …{peer[-6:]}"
        if record.stream_version is None and self.config.swarm_token is not None:
            return (
                f"{name} offers only Petals' methods, which cannot prove that it knows the swarm's token. Use "
                "servers of petals-lightning, or no token"
            )
        if record.stream_version not in (None, STREAM_VERSION):
            return (
                f"{name} speaks version {record.stream_version} of our stream protocol (petals-lightning "
                f"{record.version or 'of unknown version'}), this client speaks version {STREAM_VERSION} "
                f"(petals-lightning {__version__}). Install the same version of petals-lightning here and there"
            )
        other_model = f"{name} serves another model under {self.dht_prefix!r}"
        fix = "Load the same model here and there, or give it a dht_prefix of its own"
        if record.hidden_size is not None and record.hidden_size != self._hidden_size:
            return f"{other_model}: its hidden size is {record.hidden_size}, here it is {self._hidden_size}. {fix}"
        if record.fingerprint is not None and self._fingerprint not in (None, record.fingerprint):
            return f"{other_model}: config or tensor names differ from those here. {fix}"
        return None

    def _misfits_at(self, blocks: Collection[int]) -> list[str]:
        """Why servers that list some of these blocks cannot be used."""
        return [why for peer, why in self._misfits.items() if not set(range(*self._spans[peer])).isdisjoint(blocks)]

    async def _open(self, peer: str) -> ServerConnection:
        try:
            record, (start, _) = self._records.get(peer), self._spans.get(peer, (0, 0))
            context = self.config, self._stats, self.report_failure
            connection: ServerConnection
            if record is not None and record.stream_version is None:
                connection = await PetalsConnection.open(
                    self.node.p2p, peer, self.dht_prefix, start, *context, self._window
                )
            else:
                connection = await PeerConnection.open(self.node.p2p, peer, *context)
            hidden_size = connection.info.get("hidden_size")
            if hidden_size != self._hidden_size:
                connection.close()
                raise PeerFailure(peer, f"its hidden size is {hidden_size}, here it is {self._hidden_size}")
            self._connections[peer] = connection
            return connection
        finally:
            self._opening.pop(peer, None)

    async def _maintain(self) -> None:
        """Refreshes the view, and tries banned servers again when their time is over."""
        refreshed = time.monotonic()
        while True:
            await asyncio.sleep(min(0.5, self.config.ban_period))
            try:
                for peer, ban in list(self._bans.items()):
                    is_over = ban.until < time.monotonic() and peer not in self._refusals
                    if is_over and peer in self._spans and not self._is_readmitted(peer):
                        try:
                            await self.connection(peer)
                            logger.info("server …%s is back", peer[-6:])
                        except PeerFailure as e:
                            self.report_failure(e)
                if time.monotonic() - refreshed > self.config.refresh_period:
                    await self.refresh()
                    refreshed = time.monotonic()
            except (OSError, RuntimeError) as e:
                logger.warning("the view of the swarm could not be refreshed: %s", e)

    async def _explain_missing(self, missing: list[int]) -> str:
        excluded = [peer for peer in self._spans if not self._is_allowed(peer)]
        hint = f" ({len(excluded)} server(s) are excluded by allowed_servers / blocked_servers)" if excluded else ""
        listed = [entry.dht_prefix for entry in await self._directory.models()]
        served = ", ".join(listed[:_MODELS_TOLD]) + (
            f" and {more} more" if (more := len(listed[_MODELS_TOLD:])) else ""
        )
        reasons = {
            ban.reason: None
            for peer, ban in self._bans.items()
            if peer in self._spans and any(self._spans[peer][0] <= block < self._spans[peer][1] for block in missing)
        }
        reasons |= dict.fromkeys(self._misfits_at(missing))
        hint += "".join(f"; a server that lists them: {reason}" for reason in list(reasons)[:3])
        return (
            f"nobody serves blocks {format_blocks(missing)} of {self.dht_prefix!r} "
            f"({self.num_blocks} blocks){hint}; models listed in this swarm: {served or 'none'}. "
            "Start servers for them (`petals-lightning serve MODEL --initial-peers …`), or check dht_prefix"
        )
