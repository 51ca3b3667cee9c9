"""The settings of a server of blocks, and how it is started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import AutoModel

from petals_lightning import __version__
from petals_lightning.errors import ConfigurationError, is_out_of_memory
from petals_lightning.hf import Checkpoint, block_bytes
from petals_lightning.hf.adapter_files import adapter_bytes
from petals_lightning.hf.checkpoint import first_line
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.pruning import num_blocks
from petals_lightning.hf.quantization import check_can_quantize
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.uids import check_dht_prefix, derive_dht_prefix
from petals_lightning.server.access.limits import GIB
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.announcer import Announcer
from petals_lightning.server.blocks.graphs import measure_graph_cost
from petals_lightning.server.blocks.held_adapters import HeldAdapters
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.loading import forward_seconds, load_adapters, load_span, server_info
from petals_lightning.server.memory_plan import free_memory, plan_memory, split_blocks
from petals_lightning.server.metrics import ServerMetrics, serve_metrics
from petals_lightning.server.peer_links import PeerLinks
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.running_server import RunningServer
from petals_lightning.server.sessions.session_cache import measure_cache_bytes
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

logger = logging.getLogger(__name__)

_STOP_TIMEOUT = 5.0  # seconds for the compute thread to end, if starting fails


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
        if config.device is not None and config.devices is not None:
            raise ConfigurationError("give --device or --devices, not both")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self._devices = [torch.device(name) for name in config.devices or (config.device or default,)]
        if 2 * config.update_period > MAX_LIFETIME:
            raise ConfigurationError(
                f"update_period={config.update_period:g}: peers take no record that lasts for more than "
                f"{MAX_LIFETIME:.0f} s, and records live twice as long; use at most {MAX_LIFETIME / 2:.0f}"
            )
        check_can_quantize(config.quant_type)
        self._on_shard = on_shard

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
                config = self._fit_memory(config, adapters_bytes)
            directory = SwarmDirectory(self.node, self._rules.token)
            start, end = config.block_indices or self._choose_span(directory, prefix, count, config.num_blocks or count)
            self._check_memory(start, end)
            with self._telling_lack_of_memory(start, end):
                span = self._load(start, end)
                adapters = load_adapters(span, self._checkpoint, config.adapters)
                graph_cost = measure_graph_cost(span)
                cache_bytes_per_token = measure_cache_bytes(span) if span.has_sessions else 0.0
                record = self._record(span, adapters)
            mark = span.transfers.mark if span.transfers.is_asynchronous else None
            compute = ComputeThread(mark, depth=len(self._devices) + 1).start()
            started.callback(compute.stop, _STOP_TIMEOUT)
            resources = ServerResources(
                span,
                compute,
                config,
                info=server_info(span, self._checkpoint, config, adapters),
                adapters=adapters,
                rules=self._rules,
                peer_id=self.node.peer_id.to_base58(),
                links=PeerLinks(self.node.p2p),
                graph_cost=graph_cost,
                cache_bytes_per_token=cache_bytes_per_token,
            )
            entry = ModelEntry(prefix, count, record.repository)
            announcer = Announcer(directory, entry, record, resources, config.update_period)
            server = RunningServer(self.node, resources, prefix, announcer, petals_only=config.petals_only)
            if config.metrics_port is not None:
                metrics = ServerMetrics(resources, prefix)
                server.stop_metrics = serve_metrics(metrics, config.metrics_host, config.metrics_port)
                started.callback(server.stop_metrics)
            self.node.run(server.open())
            started.pop_all()
        return server

    def _load(self, start: int, end: int) -> BlockSpan:
        return load_span(
            self._checkpoint,
            start,
            end,
            devices=self._devices_of_blocks(start, end),
            dtype=self._config.dtype,
            quant_type=self._config.quant_type,
            share_prefix=self._config.share_prefix,
            on_shard=self._on_shard,
        )

    def _check_memory(self, start: int, end: int) -> None:
        """Raises ConfigurationError if the weights alone are more than what is free: Linux would kill the process."""
        weights, free = sum(self._block_bytes()[start:end]), sum(map(free_memory, set(self._devices)))
        if weights > free:
            raise self._too_large(start, end, f"their weights take {weights / GIB:.3g} GiB, {free / GIB:.3g} are free")

    @contextmanager
    def _telling_lack_of_memory(self, start: int, end: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, OSError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            raise self._too_large(start, end, first_line(e)) from e

    def _too_large(self, start: int, end: int, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"blocks {start}:{end} of {self._checkpoint.name_or_path} do not fit in the memory of this machine's "
            f"{self._devices[0].type} ({reason}). Hold fewer blocks with --num-blocks or --block-indices, or shrink "
            "them with --dtype bfloat16 or --quant-type nf4"
        )

    def _check_span(self, start: int, end: int, count: int) -> None:
        if not 0 <= start < end <= count:
            raise ConfigurationError(
                f"blocks {start}:{end} do not exist: {self._checkpoint.name_or_path} has {count}, numbered 0:{count}"
            )

    def _fit_memory(self, config: ServerConfig, taken: int) -> ServerConfig:
        """The settings with as many blocks as fit beside `taken` bytes, and with budgets that leave room for them."""
        free = config.memory if config.memory is not None else sum(map(free_memory, set(self._devices)))
        plan = plan_memory(self._block_bytes(), config, free - taken, is_gpu=self._devices[0].type == "cuda")
        logger.info("memory of %s: %s", " and ".join(map(str, self._devices)), plan)
        return plan.applied_to(config)

    def _block_bytes(self) -> list[int]:
        config = self._config
        return block_bytes(model_class(AutoModel, self._checkpoint), self._checkpoint, config.dtype, config.quant_type)

    def _devices_of_blocks(self, start: int, end: int) -> list[torch.device]:
        if len(self._devices) == 1:
            return self._devices * (end - start)
        free = [free_memory(device) for device in self._devices]
        chosen = split_blocks(self._block_bytes()[start:end], free)
        for number, device in enumerate(self._devices):
            logger.info("%s holds %d of the blocks", device, chosen.count(number))
        return [self._devices[number] for number in chosen]

    def _choose_span(self, directory: SwarmDirectory, prefix: str, count: int, wanted: int) -> tuple[int, int]:
        """The span of `wanted` blocks where the swarm is thinnest."""
        table = self.node.run(directory.servers(prefix, count))
        throughput = [sum(r.throughput for r in records.values() if r.state is ServerState.ONLINE) for records in table]
        return thinnest_span(throughput, wanted)

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
        )


def thinnest_span(throughput: Sequence[float], length: int) -> tuple[int, int]:
    """The span of `length` blocks with the least throughput, which limits the swarm most.

    Args:
        throughput: for each block, the summed throughput of the servers that hold it.
        length: number of blocks to host, capped at the model's.

    Returns:
        (start, end) of the window whose sorted throughputs are smallest, weakest block first; of equals the leftmost.
    """
    length = min(length, len(throughput))
    starts = range(len(throughput) - length + 1)
    start = min(starts, key=lambda first: (sorted(throughput[first : first + length]), first))
    return start, start + length
