"""The settings of a server of blocks, and how it is started."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch

from petals_lightning import __version__
from petals_lightning.errors import ConfigurationError, PetalsLightningError
from petals_lightning.hf import Checkpoint
from petals_lightning.hf.adapter_files import adapter_bytes
from petals_lightning.hf.pruning import num_blocks
from petals_lightning.hf.quantization import check_can_quantize
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.uids import check_dht_prefix, derive_dht_prefix
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.announcer import Announcer
from petals_lightning.server.blocks.graphs import measure_graph_cost
from petals_lightning.server.blocks.held_adapters import HeldAdapters
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.loading import forward_seconds, load_adapters, server_info
from petals_lightning.server.memory_plan import give_back_memory
from petals_lightning.server.metrics import ServerMetrics, serve_metrics
from petals_lightning.server.peer_links import PeerLinks
from petals_lightning.server.placement import Span, expected_throughput, placed_servers, thinnest_span
from petals_lightning.server.rebalancing import Rebalancer
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.running_server import RunningServer
from petals_lightning.server.sessions.session_cache import measure_cache_bytes
from petals_lightning.server.span_loader import SpanLoader
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry
from petals_lightning.swarm.loop_thread import in_daemon_thread
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

logger = logging.getLogger(__name__)

_STOP_TIMEOUT = 5.0  # seconds for the compute thread to end, if starting fails
_CHOICE_SECONDS, _MAX_CHOICES = 2.0, 4  # in which servers that join at the same moment see each other


class Server:
    """Serves blocks of one model.

    Args:
        checkpoint: the model.
        node: this process's peer; started and closed by the server.
        config: what it holds, offers and grants; the defaults if None.
        rules: who may use it, instead of the files that `config` names.
        on_shard: progress of loading.

    Raises:
        ConfigurationError: peers would not take the records that follow from `update_period`, a file of `config`
            cannot be read, or bitsandbytes is missing for its `quant_type`.
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
        self._config = config = config or ServerConfig()
        if config.max_disk_bytes is not None:
            checkpoint = checkpoint.within_disk_space(config.max_disk_bytes)
        self._checkpoint, self.node = checkpoint, node
        self._rules = rules or AccessRules.of_files(config.allow_peers, config.token_file)
        self._dht_prefix = check_dht_prefix(config.dht_prefix) if config.dht_prefix is not None else None
        self._loader = SpanLoader(checkpoint, config, on_shard)
        if 2 * config.update_period > MAX_LIFETIME:
            raise ConfigurationError(
                f"update_period={config.update_period:g}: peers take no record that lasts for more than "
                f"{MAX_LIFETIME:.0f} s, and records live twice as long; use at most {MAX_LIFETIME / 2:.0f}"
            )
        check_can_quantize(config.quant_type)

    @property
    def dht_prefix(self) -> str:
        if self._dht_prefix is None:
            self._dht_prefix = derive_dht_prefix(
                self._checkpoint.name_or_path, self._checkpoint.config.model_type, is_local=self._checkpoint.is_local
            )
        return self._dht_prefix

    def start(self, on_joined: Callable[[], None] = lambda: None) -> RunningServer:
        """Joins the swarm, loads the span and announces itself; returns when clients can find it.

        Args:
            on_joined: called once other peers can reach this one, before blocks are loaded.

        Raises:
            ConfigurationError: the model, the span, an adapter or an address is wrong.
            SwarmConnectionError: the swarm cannot be joined, or takes no record.
        """
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        prefix, count = self.dht_prefix, num_blocks(self._checkpoint.config)
        if config.block_indices is not None:
            self._check_span(*config.block_indices, count)
        adapters_bytes = sum(adapter_bytes(source, token=self._checkpoint.token) for source in config.adapters)
        self.node.start()
        with ExitStack() as started:
            started.callback(self.node.close)
            on_joined()
            if config.block_indices is None and config.num_blocks is None:
                self._config = config = self._loader.plan(adapters_bytes)
            directory = SwarmDirectory(self.node, self._rules.token)
            joining = self._choose_span(directory, prefix, count)
            announcer = Announcer(
                directory, ModelEntry(prefix, count, joining.repository), joining, config.update_period
            )
            self.node.run(announcer.start())
            started.callback(lambda: self.node.run(announcer.leave(_STOP_TIMEOUT)))
            if joining.next_start is not None:
                self.node.run(self._agree(directory, announcer))
            resources, record = self._hold(_span_of(announcer.record))
            started.callback(resources.compute.stop, _STOP_TIMEOUT)
            server = RunningServer(self.node, resources, prefix, announcer, petals_only=config.petals_only)
            if config.metrics_port is not None:
                metrics = ServerMetrics(lambda: server.serving, prefix)
                server.stop_metrics = serve_metrics(metrics, config.metrics_host, config.metrics_port)
                started.callback(server.stop_metrics)
            self.node.run(server.open(record))
            if self._moves(record, count):
                self.node.run(self._keep_balanced(server, directory, announcer))
            started.pop_all()
        return server

    def _moves(self, record: ServerRecord, count: int) -> bool:
        """Whether the server goes where the swarm is thin later, too."""
        config = self._config
        chosen = config.block_indices is None and _span_of(record) != (0, count)
        return chosen and config.balance_quality > 0 and not config.petals_only

    async def _keep_balanced(self, server: RunningServer, directory: SwarmDirectory, announcer: Announcer) -> None:
        rebalancer = Rebalancer(
            directory,
            ModelEntry(self.dht_prefix, num_blocks(self._checkpoint.config), server.record.repository),
            announcer,
            lambda span: self._move(server, span),
            peer=self.node.peer_id.to_base58(),
            quality=self._config.balance_quality,
            period=self._config.balance_period,
        )
        server.keep_moving(rebalancer.run())

    async def _move(self, server: RunningServer, span: Span) -> None:
        """Leaves the server's blocks for others. If those cannot be loaded, it takes its old ones again."""
        before = _span_of(server.record)
        logger.info("moving from blocks %d:%d to %d:%d, where the swarm is thinner", *before, *span)
        joining = replace(
            server.record, state=ServerState.JOINING, start=span[0], end=span[1], next_start=None, next_end=None,
            can_move=False,
        )  # fmt: skip
        await server.vacate(joining, self._config.drain_timeout)
        give_back_memory()
        try:
            resources, record = await in_daemon_thread(lambda: self._hold(span))
        except (PetalsLightningError, OSError) as e:
            logger.warning("blocks %d:%d could not be loaded, going back to %d:%d: %s", *span, *before, e)
            resources, record = await in_daemon_thread(lambda: self._hold(before))
        await server.resume(resources, record)
        logger.info("ready: blocks %d:%d of %s", resources.span.start, resources.span.end, self.dht_prefix)

    def _hold(self, place: Span) -> tuple[ServerResources, ServerRecord]:
        """Loads blocks, measures them and starts what runs them."""
        with self._loader.telling_lack_of_memory(*place):
            span = self._loader.load(*place)
            adapters = load_adapters(span, self._checkpoint, self._config.adapters)
            graph_cost = measure_graph_cost(span)
            cache_bytes_per_token = measure_cache_bytes(span) if span.has_sessions else 0.0
            record = self._record(span, adapters)
        mark = span.transfers.mark if span.transfers.is_asynchronous else None
        resources = ServerResources(
            span,
            ComputeThread(mark, depth=len(self._loader.devices) + 1).start(),
            self._config,
            info=server_info(span, self._checkpoint, self._config, adapters),
            adapters=adapters,
            rules=self._rules,
            peer_id=self.node.peer_id.to_base58(),
            links=PeerLinks(self.node.p2p),
            graph_cost=graph_cost,
            cache_bytes_per_token=cache_bytes_per_token,
        )
        return resources, record

    def _check_span(self, start: int, end: int, count: int) -> None:
        if not 0 <= start < end <= count:
            raise ConfigurationError(
                f"blocks {start}:{end} do not exist: {self._checkpoint.name_or_path} has {count}, numbered 0:{count}"
            )

    def _choose_span(self, directory: SwarmDirectory, prefix: str, count: int) -> ServerRecord:
        """The record to announce while blocks are loaded: those that were asked for, or the thinnest of the swarm."""
        config, throughput, is_final = self._config, self._config.throughput or 1.0, True
        if config.block_indices is not None:
            start, end = config.block_indices
        else:
            length = min(config.num_blocks or count, count)
            servers = placed_servers(self.node.run(directory.servers(prefix, count)))
            throughput = config.throughput or expected_throughput(servers, length)
            start, end = thinnest_span(servers, count, length, throughput)
            is_final = length == count or not self.node.initial_peers
        return ServerRecord(
            state=ServerState.JOINING,
            throughput=throughput,
            start=start,
            end=end,
            public_name=config.public_name,
            version=__version__,
            stream_version=None if config.petals_only else STREAM_VERSION,
            num_blocks=count,
            repository=None if self._checkpoint.is_local else self._checkpoint.name_or_path,
            using_relay=self.node.using_relay,
            next_start=None if is_final else start,
            next_end=None if is_final else end,
        )

    async def _agree(self, directory: SwarmDirectory, announcer: Announcer) -> None:
        """Has servers that join at the same moment choose different places: those with lesser ids choose first."""
        count, own = num_blocks(self._checkpoint.config), self.node.peer_id.to_base58()
        for _ in range(_MAX_CHOICES):
            record = announcer.record
            start, end = _span_of(record)
            await asyncio.sleep(_CHOICE_SECONDS)
            found = placed_servers(await directory.servers(self.dht_prefix, count))
            servers = [each for each in found if each.peer < own or (each.peer != own and each.next_span is None)]
            span = thinnest_span(servers, count, end - start, record.throughput)
            if span == (start, end):
                break
            announcer.record = replace(record, start=span[0], end=span[1], next_start=span[0], next_end=span[1])
            await announcer.announce()
        announcer.record = replace(announcer.record, next_start=None, next_end=None)
        await announcer.announce()

    def _record(self, span: BlockSpan, adapters: HeldAdapters) -> ServerRecord:
        """The record to announce, with the speed of a small forward."""
        batch, tokens = 4, 64
        seconds = forward_seconds(span, batch, tokens)
        return ServerRecord(
            state=ServerState.ONLINE,
            throughput=self._config.throughput if self._config.throughput is not None else 1 / seconds,
            start=span.start,
            end=span.end,
            public_name=self._config.public_name,
            version=__version__,
            torch_dtype=str(span.dtype).removeprefix("torch."),
            quant_type=span.quant_type,
            tokens_per_second=batch * tokens * (span.end - span.start) / seconds,
            stream_version=None if self._config.petals_only else STREAM_VERSION,
            hidden_size=span.hidden_size,
            fingerprint=self._checkpoint.fingerprint,
            num_blocks=num_blocks(self._checkpoint.config),
            adapters=tuple(adapters.fingerprints),
            repository=None if self._checkpoint.is_local else self._checkpoint.name_or_path,
            using_relay=self.node.using_relay,
        )


def _span_of(record: ServerRecord) -> Span:
    assert record.start is not None
    assert record.end is not None
    return record.start, record.end
