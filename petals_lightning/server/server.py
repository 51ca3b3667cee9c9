"""A server of blocks: loads its span, joins the swarm, announces itself, serves, and leaves in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.control import StreamHandler
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from transformers import AutoModel

from petals_lightning import __version__
from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.hf import Checkpoint, Part, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.skeleton import num_blocks
from petals_lightning.protocol.checks import WIRE_DTYPES
from petals_lightning.protocol.messages import STREAM_METHOD
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.uids import check_dht_prefix, derive_dht_prefix
from petals_lightning.server.access import AccessRules
from petals_lightning.server.backend import Backend
from petals_lightning.server.compute import ComputeThread
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.cpu_decoding import order_weights_for_decoding
from petals_lightning.server.graphs import measure_graph_cost
from petals_lightning.server.inference import measure_cache_bytes
from petals_lightning.server.joint_steps import verify_joint_steps
from petals_lightning.server.links import Links
from petals_lightning.server.petals import PetalsMethods
from petals_lightning.server.placement import thinnest_span
from petals_lightning.server.session import Session
from petals_lightning.server.span import BlockSpan, SpanInputs
from petals_lightning.server.trials import check_family, verify_sessions, verify_shared_prefix, verify_skipping
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

logger = logging.getLogger(__name__)

_DAEMON_ERRORS = (OSError, EOFError, P2PDaemonError, ControlFailure)  # TimeoutError is an OSError


class Server:
    """Serves blocks of one model.

    Args:
        checkpoint: the model.
        node: this process's peer; started and closed by the server.
        config: what it holds, offers and grants; the defaults if None.
        rules: who may use it, instead of the files that `config` names.
        on_shard: progress of loading.

    Raises:
        ConfigurationError: peers would not take the records that follow from `update_period`, or a file of `config`
            cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        node: SwarmNode,
        *,
        config: ServerConfig | None = None,
        rules: AccessRules | None = None,
        on_shard: Callable[[str, int, int], None] | None = None,
    ):
        self._checkpoint, self.node = checkpoint, node
        self._config = config = config or ServerConfig()
        self._rules = rules or AccessRules.of_files(config.allow_peers, config.token_file)
        self._dht_prefix = check_dht_prefix(config.dht_prefix) if config.dht_prefix is not None else None
        self._device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if 2 * config.update_period > MAX_LIFETIME:
            raise ConfigurationError(
                f"update_period={config.update_period:g}: peers take no record that lasts for more than "
                f"{MAX_LIFETIME:.0f} s, and records live twice as long; use at most {MAX_LIFETIME / 2:.0f}"
            )
        self._on_shard = on_shard
        self._compute: ComputeThread | None = None
        self._announcer: Any = None
        self._backend: Backend | None = None
        self._record: ServerRecord | None = None
        self._sessions: set[asyncio.Task[Any]] = set()

    @property
    def span(self) -> BlockSpan:
        assert self._backend is not None, "the server has not been started"
        return self._backend.span

    @property
    def dht_prefix(self) -> str:
        if self._dht_prefix is None:
            self._dht_prefix = derive_dht_prefix(
                self._checkpoint.name_or_path, self._checkpoint.config.model_type, is_local=self._checkpoint.is_local
            )
        return self._dht_prefix

    def start(self, on_joined: Callable[[], None] = lambda: None) -> None:
        """Joins the swarm, loads the span and announces itself; returns when clients can find it.

        Args:
            on_joined: called once others can reach this peer, before blocks are loaded.

        Raises:
            ConfigurationError: the model, the span or an address is wrong.
            SwarmConnectionError: the swarm cannot be joined, or takes no record.
        """
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        prefix, count = self.dht_prefix, num_blocks(self._checkpoint.config)
        if self._config.block_indices is not None:
            self._check_span(*self._config.block_indices, count)
        self.node.start()
        try:
            on_joined()
            start, end = self._config.block_indices or self._choose_span(prefix, count)
            logger.info("loading blocks %d:%d of %s", start, end, self._checkpoint.name_or_path)
            span = self._load(start, end)
            self._compute = ComputeThread(span.transfers.mark if span.transfers.is_asynchronous else None)
            self._backend = Backend(
                span,
                self._compute,
                self._config,
                info={},
                rules=self._rules,
                peer_id=self.node.peer_id.to_base58(),
                links=Links(self.node.p2p),
            )
            self._backend.graph_cost = measure_graph_cost(span)
            self._backend.cache_bytes_per_token = measure_cache_bytes(span) if span.has_sessions else 0.0
            record = self._measure(span)
            self._backend.info = {
                "start": start,
                "end": end,
                "num_blocks": count,
                "hidden_size": span.hidden_size,
                "dtype": record.torch_dtype,
                "wire_dtypes": sorted(WIRE_DTYPES),
                "fingerprint": record.fingerprint,
                "version": __version__,
                "max_batch_tokens": self._config.max_batch_tokens,
                "max_message_bytes": self._config.max_message_bytes,
                "max_open_requests": self._config.max_open_requests,
                "request_seconds": self._request_seconds(span),
            }
            self.node.run(self._open(prefix, count, record))
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 5.0) -> None:
        """Announces that it leaves, finishes what is under way within `timeout` seconds, closes everything."""
        deadline = time.monotonic() + timeout
        try:
            if self._announcer is not None:
                self.node.run(self._leave(timeout))
        finally:
            self._announcer = None
            if self._compute is not None:
                self._compute.stop(max(0.0, deadline - time.monotonic()))
                self._compute = None
            self.node.close()

    def _directory(self) -> SwarmDirectory:
        return SwarmDirectory(self.node, self._rules.token)

    def _check_span(self, start: int, end: int, count: int) -> None:
        if not 0 <= start < end <= count:
            raise ConfigurationError(
                f"blocks {start}:{end} do not exist: {self._checkpoint.name_or_path} has {count}, numbered 0:{count}"
            )

    def _choose_span(self, prefix: str, count: int) -> tuple[int, int]:
        wanted = count if self._config.num_blocks is None else self._config.num_blocks
        table = self.node.run(self._directory().servers(prefix, count))
        held = [sum(r.throughput for r in records.values() if r.state is ServerState.ONLINE) for records in table]
        return thinnest_span(held, wanted)

    def _load(self, start: int, end: int) -> BlockSpan:
        model, layout, _ = load_pruned(
            model_class(AutoModel, self._checkpoint),
            self._checkpoint,
            Part(start, end, ends=False),
            dtype=self._config.dtype,
            on_shard=self._on_shard,
        )
        order_weights_for_decoding(model.to(self._device))  # type: ignore[arg-type]
        span = BlockSpan(model, layout, start)
        check_family(span)
        span.share_prefix = self._config.share_prefix and verify_shared_prefix(span)
        if self._config.share_prefix and not span.share_prefix:
            logger.info("this family computes the prefix per sample: its attention is not of the ordinary kind")
        span.skips_unread = span.share_prefix and verify_skipping(span)
        if span.share_prefix and not span.skips_unread:
            logger.info("this family runs its last block on all positions: it is not of the ordinary kind")
        span.has_sessions = verify_sessions(span)
        if not span.has_sessions:
            logger.warning("this family keeps more than keys and values: it is served for training and evaluation only")
        span.joins_steps = span.has_sessions and verify_joint_steps(span)
        if span.has_sessions and not span.joins_steps:
            logger.info("steps of several sessions are not batched: this family gave different results when they were")
        return span

    def _measure(self, span: BlockSpan) -> ServerRecord:
        """The record to announce, with the speed of a small forward."""
        hidden = torch.randn(4, 64, span.hidden_size, device=span.device, dtype=span.dtype)
        seconds = _forward_seconds(span, SpanInputs(span.start, span.end, hidden))
        tokens_per_second = hidden.shape[0] * hidden.shape[1] * (span.end - span.start) / seconds
        return ServerRecord(
            state=ServerState.ONLINE,
            throughput=self._config.throughput if self._config.throughput is not None else 1 / seconds,
            start=span.start,
            end=span.end,
            public_name=self._config.public_name,
            version=__version__,
            torch_dtype=str(span.dtype).removeprefix("torch."),
            tokens_per_second=tokens_per_second,
            stream_version=None if self._config.petals_only else STREAM_VERSION,
            hidden_size=span.hidden_size,
            fingerprint=self._checkpoint.fingerprint,
            num_blocks=num_blocks(self._checkpoint.config),
            repository=None if self._checkpoint.is_local else self._checkpoint.name_or_path,
        )

    def _request_seconds(self, span: BlockSpan) -> float:
        """What a request takes however small it is: a prefix and a sample of one position."""
        hidden = torch.randn(1, 1, span.hidden_size, device=span.device, dtype=span.dtype)
        return _forward_seconds(span, SpanInputs(span.start, span.end, hidden, prefix=hidden[0]))

    async def _open(self, prefix: str, count: int, record: ServerRecord) -> None:
        assert self._backend is not None
        petals = PetalsMethods(self._backend, prefix, self.node.p2p)
        await petals.register()
        streams: dict[str, StreamHandler] = {
            name: partial(petals.serve_stream, method) for name, method in petals.streams.items()
        }
        if not self._config.petals_only:
            streams[STREAM_METHOD] = self._serve_session
        for name, serve in streams.items():
            await self.node.p2p.add_binary_stream_handler(name, partial(self._handle_stream, serve))
        if not await self._announce(prefix, count, record):
            raise SwarmConnectionError(
                f"the swarm took no record of {prefix!r}: check that this machine's clock is right and its peers answer"
            )
        self._record = record
        self._announcer = asyncio.create_task(self._announce_forever(prefix, count, record))

    async def _announce(self, prefix: str, count: int, record: ServerRecord) -> bool:
        directory, lifetime = self._directory(), max(2 * self._config.update_period, 3.0)
        if record.state is ServerState.ONLINE:
            await directory.announce_model(ModelEntry(prefix, count, record.repository), lifetime)
        assert self._backend is not None
        left = replace(record, cache_tokens_left=self._backend.cache_tokens_left)
        return await directory.announce(prefix, left, lifetime)

    async def _announce_forever(self, prefix: str, count: int, record: ServerRecord) -> None:
        period = self._config.update_period
        while True:
            await asyncio.sleep(period)
            assert self._backend is not None
            self._backend.graphs.expire()
            self._backend.caches.expire()
            try:
                # hivemind waits for ever for a daemon that has died
                async with asyncio.timeout(max(period, 10.0)):
                    stored = await self._announce(prefix, count, record)
            except _DAEMON_ERRORS as e:  # or this task would end, and with it, unnoticed, the server's visibility
                logger.debug("announcing failed", exc_info=e)
                stored = False
            if not stored:
                logger.warning("the swarm did not take this announcement; trying again in %gs", period)

    async def _leave(self, timeout: float) -> None:
        assert self._backend is not None
        assert self._record is not None
        self._backend.leaving = True
        self._announcer.cancel()
        await asyncio.wait([self._announcer])
        deadline = time.monotonic() + timeout
        try:
            count, offline = num_blocks(self._checkpoint.config), replace(self._record, state=ServerState.OFFLINE)
            await asyncio.wait_for(self._announce(self.dht_prefix, count, offline), timeout / 2)
        except _DAEMON_ERRORS:
            logger.warning("no peer took the message that this server leaves; its record expires by itself")
        while self._backend.under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for session in list(self._sessions):
            session.cancel()
        assert self._backend.links is not None
        self._backend.links.close()

    async def _serve_session(
        self, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        assert self._backend is not None
        await Session(self._backend, info.peer_id.to_base58(), reader, writer).serve()

    async def _handle_stream(
        self,
        serve: StreamHandler,
        info: StreamInfo,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        assert self._backend is not None
        task = asyncio.current_task()
        assert task is not None
        if len(self._sessions) >= self._config.all_streams * 3 // 2:  # too many are being told that there is no room
            writer.close()
            return
        self._sessions.add(task)
        try:
            await serve(info, reader, writer)
        except asyncio.CancelledError:
            if not self._backend.leaving:
                raise
        finally:
            self._sessions.discard(task)


@torch.no_grad()
def _forward_seconds(span: BlockSpan, inputs: SpanInputs) -> float:
    """The shortest of three runs: others may be using the machine."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        span.forward(inputs)[0].sum().item()  # waits for the GPU too
        seconds.append(time.perf_counter() - began)
    return min(seconds)
