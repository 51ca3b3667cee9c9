"""The servers of one model as a client knows them: records, connections, speeds, and bans."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from petals_lightning import __version__
from petals_lightning.client.config import ClientConfig
from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.petals.connection import PetalsConnection
from petals_lightning.client.routing import format_blocks
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.client.speed import DEFAULT_HOP_SECONDS, SpeedEstimates
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import (
    AccessDeniedError,
    PeerFailure,
    WrongResult,
)
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.tensors import INT8_BLOCKWISE
from petals_lightning.swarm import SwarmDirectory, SwarmNode

logger = logging.getLogger(__name__)

_DEFAULT_TOKENS_PER_SECOND = 1000.0
_ADVERTISED_SPEED_WEIGHT = 0.5  # an announced speed is that of an idle server; a measured one has weight 1
_RELAY_SECONDS = 0.2  # by which a server behind a relay counts as farther, until requests have measured it
_MAX_BAN = 300.0
_FORGET_FAILURES = 300.0  # seconds after a ban; a later failure counts as the first again
_PROVEN_WRONG_BAN = 86400.0  # seconds: a judge has contradicted the server, so it gets no second chance soon
_MODELS_LISTED = 20  # in an error message; any peer may list thousands


@dataclass
class _Ban:
    until: float
    count: int
    is_proven: bool
    reason: str


class ServerPool:
    """The servers of one model. All methods belong to the node's loop.

    A failed server leaves the pool at once. It comes back when its ban is over and a connection, opened in the
    background, succeeds. So a dead server's record that lives on in the DHT never costs a step again.

    Args:
        node: this process's peer, started.
        dht_prefix, num_blocks, hidden_size: identify the model.
        fingerprint: of the model's weights here; servers with another fingerprint are not used.
        sliding_window: reach of the model's attention in positions, padding counted; None: unlimited.
        beyond_petals: what the model has that servers with Petals' methods only do not take; they are not used then.
        active_adapter: acts in the blocks; a server must hold it if it cannot be sent.
        config: timeouts and filters.
        stats: counts bytes and retries.

    Attributes:
        spans: blocks [start, end) that each server announces, by peer id, including servers that may not be used.
        speeds: as measured by our own requests.
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
        beyond_petals: str | None,
        active_adapter: Adapter | None = None,
        config: ClientConfig,
        stats: TransferStats,
    ):
        self.node, self.dht_prefix, self.num_blocks, self.config = node, dht_prefix, num_blocks, config
        self.spans: dict[str, tuple[int, int]] = {}
        self.speeds = SpeedEstimates()
        self._hidden_size, self._fingerprint, self._stats = hidden_size, fingerprint, stats
        self._window, self._beyond_petals, self._active_adapter = sliding_window, beyond_petals, active_adapter
        self._directory = SwarmDirectory(node, config.swarm_token)
        self._records: dict[str, ServerRecord] = {}
        self._incompatible: dict[str, str] = {}
        self._refusals: dict[str, str] = {}
        self._bans: dict[str, _Ban] = {}
        self._connections: dict[str, ServerConnection] = {}
        self._opening: dict[str, asyncio.Task[ServerConnection]] = {}
        self._maintenance: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the records, and starts to refresh them."""
        await self.refresh()
        self._maintenance = asyncio.create_task(self._maintain())

    async def close(self) -> None:
        if self._maintenance is not None:
            self._maintenance.cancel()
        for task in self._opening.values():
            task.cancel()
        for connection in list(self._connections.values()):
            connection.close()
        self._connections.clear()

    async def refresh(self) -> None:
        """Reads the records again."""
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
                if end == block:  # a span is contiguous; blocks after a gap are left over from an earlier span
                    spans[peer] = (first, block + 1)
                    records[peer] = record
        # A missing record proves nothing about a server. An open stream proves that it lives.
        for peer, connection in self._connections.items():
            if peer in self.spans and peer not in gone and peer not in spans and connection.is_open:
                spans[peer], records[peer] = self.spans[peer], self._records[peer]
        self.spans, self._records = spans, records
        self._forget_absent()
        self._incompatible = {
            peer: why for peer, record in records.items() if (why := self._incompatibility(peer, record))
        }

    async def connection(self, peer: str) -> ServerConnection:
        """The open connection to a server, opened if needed (once, even if several callers wait).

        Raises:
            PeerFailure: it cannot be opened, or the server contradicts its record.
        """
        connection = self._connections.get(peer)
        if connection is not None and connection.is_open:
            return connection
        if peer not in self._opening:
            self._opening[peer] = opening = asyncio.create_task(self._open(peer))
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # callers may be gone
        return await asyncio.shield(self._opening[peer])

    def report_failure(self, failure: PeerFailure) -> None:
        """Takes a server out of the pool and bans it, longer each time."""
        peer = failure.peer
        if failure.code == ErrorCode.NOT_ALLOWED.value:
            self._refusals[peer] = failure.reason
        known, proven = self._bans.get(peer), isinstance(failure, WrongResult) and failure.proven
        if known is not None and known.until > time.monotonic() and (known.is_proven or not proven):
            return  # several requests in flight may report one failure
        is_recent = known is not None and time.monotonic() - known.until < _FORGET_FAILURES
        count = known.count + 1 if known is not None and is_recent else 1
        period = _PROVEN_WRONG_BAN if proven else min(self.config.ban_period * 2 ** (count - 1), _MAX_BAN)
        self._bans[peer] = _Ban(time.monotonic() + period, count, proven, failure.reason)
        if failure.code is None:  # the stream or the server failed; after a mere refusal, other requests go on
            connection = self._connections.pop(peer, None)
            if connection is not None:
                connection.close()
        # A server that stays away is logged once, however often the background task tries it.
        level = logging.WARNING if count == 1 or proven else logging.INFO
        logger.log(level, "%s; not using it for at least %.0f s", self._named(failure), period)

    def shorten_bans(self, blocks: Collection[int]) -> None:
        """Has the servers of these blocks tried again soon, because there is no other."""
        soon = time.monotonic() + self.config.ban_period
        for peer, ban in self._bans.items():
            if not ban.is_proven and peer in self.spans and not set(range(*self.spans[peer])).isdisjoint(blocks):
                ban.until = min(ban.until, soon)

    def forgive(self, peer: str) -> None:
        """Lifts a ban, because the failure was not the server's."""
        if peer in self._bans and not self._bans[peer].is_proven:
            del self._bans[peer]

    def is_trusted(self, peer: str) -> bool:
        """Whether the user believes this server."""
        return peer in self.config.trusted_servers

    def is_proven_wrong(self, peer: str) -> bool:
        """Whether a judge has contradicted this server (see `audit`)."""
        return peer in self._bans and self._bans[peer].is_proven

    def compute_dtype(self, peer: str) -> str | None:
        """The dtype in which a server computes, as it reports."""
        record = self._records.get(peer)
        return record.torch_dtype if record is not None else None

    def quant_type(self, peer: str) -> str:
        """How a server's weights are kept, as it reports; equal ones give the same results, up to their dtype.

        Petals' own int8 and nf4 round differently from ours.
        """
        record, announced = self._records.get(peer), self._announced_quant_type(peer)
        is_petals = record is not None and record.stream_version is None
        return f"Petals' {announced}" if is_petals and announced != UNQUANTIZED else announced

    def wire_dtype(self, peer: str) -> str:
        """The dtype for tensors to and from a server."""
        configured, connection = self.config.wire_dtype, self._connections.get(peer)
        supported = connection.info.get("wire_dtypes") if connection is not None else None
        can_quantise = isinstance(supported, list) and INT8_BLOCKWISE in supported
        if configured != "auto" and (configured != INT8_BLOCKWISE or can_quantise):
            return configured
        record = self._records.get(peer)
        return record.torch_dtype if record is not None and record.torch_dtype in ("float16", "bfloat16") else "float32"

    def usable(self) -> list[str]:
        """Peer ids of the servers that may be used now."""
        return [peer for peer in self.may_be_used() if peer not in self._bans or self._is_readmitted(peer)]

    def may_be_used(self) -> list[str]:
        """The same, including servers that are banned for a while after a failure."""
        return [peer for peer in self.spans if self._may_be_used(peer)]

    def speed(self, peer: str) -> tuple[float, float]:
        """Seconds of a round trip, and tokens per second of one block: measured, or as the server claims."""
        if (speed := self.speeds.by_peer.get(peer)) is not None:
            return speed.hop_seconds, speed.tokens_per_second
        record, connection = self._records.get(peer), self._connections.get(peer)
        hop = connection.round_trip if connection is not None else None
        hop = hop if hop is not None else DEFAULT_HOP_SECONDS
        claimed = record.tokens_per_second if record is not None else None
        if record is not None and record.using_relay:  # others share the relay; a direct connection may follow
            hop += _RELAY_SECONDS
        return hop, (claimed or _DEFAULT_TOKENS_PER_SECOND) * _ADVERTISED_SPEED_WEIGHT

    def silence(self, peer: str) -> float:
        """Seconds since a server's oldest unanswered ping."""
        connection = self._connections.get(peer)
        return connection.silence if connection is not None else 0.0

    def round_trip(self, peer: str) -> float | None:
        """Seconds of a call to a server that computes nothing; None before the first."""
        connection = self._connections.get(peer)
        return connection.round_trip if connection is not None else None

    def max_batch_tokens(self, peer: str) -> int | None:
        """B·(P + S) that a server takes in one request, if known."""
        connection = self._connections.get(peer)
        limit = connection.info.get("max_batch_tokens") if connection is not None else None
        return limit if type(limit) is int and limit > 0 else None

    def public_name(self, peer: str) -> str | None:
        record = self._records.get(peer)
        return record.public_name if record is not None else None

    def _may_be_used(self, peer: str) -> bool:
        return peer not in self._incompatible and peer not in self._refusals and self._is_allowed(peer)

    def _forget_absent(self) -> None:
        """Drops what is known of servers without a record or a running ban: servers come and go under new ids."""
        now = time.monotonic()
        self._bans = {p: ban for p, ban in self._bans.items() if p in self.spans or ban.until > now}
        self.speeds.forget_absent(self.spans)
        self._refusals = {p: words for p, words in self._refusals.items() if p in self.spans}

    def check_refusals(self, missing: list[int]) -> None:
        """Raises AccessDeniedError if all servers of a block refuse this peer: then waiting does not help."""
        for block in missing:
            holders = [peer for peer, (start, end) in self.spans.items() if start <= block < end]
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
        quant_types = self.config.allowed_quantization
        return (
            peer not in self.config.blocked_servers
            and (allowed is None or peer in allowed)
            and (quant_types is None or self._announced_quant_type(peer) in quant_types)
        )

    def _announced_quant_type(self, peer: str) -> str:
        record = self._records.get(peer)
        return record.quant_type if record is not None else UNQUANTIZED

    def _is_readmitted(self, peer: str) -> bool:
        ban, connection = self._bans.get(peer), self._connections.get(peer)
        is_over = ban is None or ban.until < time.monotonic()
        return is_over and connection is not None and connection.is_open

    def _incompatibility(self, peer: str, record: ServerRecord) -> str | None:
        name = f"server …{peer[-6:]} ({record.public_name})" if record.public_name else f"server …{peer[-6:]}"
        if record.stream_version is None and self.config.swarm_token is not None:
            return (
                f"{name} offers only Petals' methods, which cannot prove that it knows the swarm's token. Use "
                "servers of petals-lightning, or no token"
            )
        if record.stream_version is None and self._beyond_petals is not None:
            return (
                f"{name} offers only Petals' methods, which take no {self._beyond_petals}. Use servers of "
                "petals-lightning, or train prompts with ptune or deep_ptune"
            )
        if (active := self._active_adapter) is not None and active.name not in record.adapters:
            if active.fingerprint is None:
                return (
                    f"{name} does not hold the adapter {active.name!r}. Start it with --adapters, or name a folder, "
                    "active_adapter=FOLDER: what is in it is sent"
                )
            if record.stream_version is None:
                return (
                    f"{name} does not hold the adapter {active.name!r}, and cannot be sent it, because it offers only "
                    "Petals' methods"
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

    def incompatible_at(self, blocks: Collection[int]) -> list[str]:
        """Why servers that list some of these blocks cannot be used."""
        return [why for peer, why in self._incompatible.items() if not set(range(*self.spans[peer])).isdisjoint(blocks)]

    async def _open(self, peer: str) -> ServerConnection:
        try:
            record, (start, _) = self._records.get(peer), self.spans.get(peer, (0, 0))
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
        """Refreshes the records periodically, and tries banned servers when their ban is over."""
        refreshed = time.monotonic()
        async with asyncio.TaskGroup() as trials:  # each on its own: one that hangs must not keep the others waiting
            while True:
                await asyncio.sleep(min(0.5, self.config.ban_period))
                for peer in self.spans.keys() & self._bans.keys() - self._refusals.keys() - self._opening.keys():
                    if self._bans[peer].until < time.monotonic() and not self._is_readmitted(peer):
                        trials.create_task(self._try_again(peer))
                if time.monotonic() - refreshed > self.config.refresh_period:
                    await self._refresh_if_possible()
                    refreshed = time.monotonic()

    async def _try_again(self, peer: str) -> None:
        try:
            await self.connection(peer)
            logger.info("server …%s is back", peer[-6:])
        except PeerFailure as e:
            self.report_failure(e)
        except Exception as e:  # whatever it was, the other servers must still be tried
            logger.exception("server …%s could not be tried", peer[-6:])
            self.report_failure(PeerFailure(peer, f"could not be tried ({type(e).__name__})"))

    async def _refresh_if_possible(self) -> None:
        try:
            await self.refresh()
        except Exception:  # whatever it was, the next time may succeed, and banned servers must still be tried
            logger.exception("the records of the swarm could not be read again")

    async def explain_missing(self, missing: list[int]) -> str:
        """Why no server can be used for these blocks."""
        excluded = [peer for peer in self.spans if not self._is_allowed(peer)]
        hint = (
            f" ({len(excluded)} server(s) are excluded by allowed_servers, blocked_servers or allowed_quantization)"
            if excluded
            else ""
        )
        listed = [entry.dht_prefix for entry in await self._directory.models()]
        served = ", ".join(listed[:_MODELS_LISTED]) + (
            f" and {more} more" if (more := len(listed[_MODELS_LISTED:])) else ""
        )
        reasons = {
            ban.reason: None
            for peer, ban in self._bans.items()
            if peer in self.spans and any(self.spans[peer][0] <= block < self.spans[peer][1] for block in missing)
        }
        reasons |= dict.fromkeys(self.incompatible_at(missing))
        hint += "".join(f"; a server that lists them: {reason}" for reason in list(reasons)[:3])
        return (
            f"no usable server holds blocks {format_blocks(missing)} of {self.dht_prefix!r} "
            f"({self.num_blocks} blocks){hint}; models listed in this swarm: {served or 'none'}. "
            "Start servers for them (`petals-lightning serve MODEL --initial-peers …`), or check dht_prefix"
        )
