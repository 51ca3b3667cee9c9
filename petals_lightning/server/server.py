"""The settings of a server of blocks, and how it is started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from petals_lightning import __version__
from petals_lightning.errors import ConfigurationError
from petals_lightning.hf import Checkpoint
from petals_lightning.hf.skeleton import num_blocks
from petals_lightning.protocol.records import STREAM_VERSION, ServerRecord, ServerState
from petals_lightning.protocol.uids import check_dht_prefix, derive_dht_prefix
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.announcer import Announcer
from petals_lightning.server.blocks.graphs import measure_graph_cost
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.loading import forward_seconds, load_span, server_info
from petals_lightning.server.peer_links import PeerLinks
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.running_server import RunningServer
from petals_lightning.server.sessions.session_cache import measure_cache_bytes
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

_STOP_TIMEOUT = 5.0  # seconds for the compute thread to end, if starting fails


class Server:
    """Serves blocks of one model.

    Args:
        checkpoint: the model.
        node: this process's peer; started and closed by the server.
        block_indices: (start, end) to hold, or None to choose `num_blocks` where the swarm is thinnest.
        num_blocks: how many to hold if `block_indices` is None; None takes all.
        dht_prefix: name of the model in the DHT; None derives it from the hub id.
        device, dtype: where and how blocks run; "auto" dtype is the checkpoint's.
        public_name: shown to users of the swarm.
        throughput: requests a second to announce; None measures it.
        update_period: seconds between announcements; records live twice as long.
        limits: budgets.
        rules: who may use it; everybody by default.
        petals_only: offer Petals' methods and not our own stream method, as a Petals server does.
        share_prefix: run a prefix once for the batch, where the family allows it; False shows what that saves.
        on_shard: progress of loading.

    Raises:
        ConfigurationError: peers would not take the records that follow from `update_period`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        node: SwarmNode,
        *,
        block_indices: tuple[int, int] | None = None,
        num_blocks: int | None = None,
        dht_prefix: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        public_name: str | None = None,
        throughput: float | None = None,
        update_period: float = 60.0,
        limits: ServerLimits | None = None,
        rules: AccessRules | None = None,
        petals_only: bool = False,
        share_prefix: bool = True,
        on_shard: Callable[[str, int, int], None] | None = None,
    ):
        self._checkpoint, self.node = checkpoint, node
        self._block_indices, self._num_blocks = block_indices, num_blocks
        self._dht_prefix = check_dht_prefix(dht_prefix) if dht_prefix is not None else None
        self._device, self._dtype = torch.device(device), dtype
        self._public_name, self._throughput = public_name, throughput
        if 2 * update_period > MAX_LIFETIME:
            raise ConfigurationError(
                f"update_period={update_period:g}: peers take no record that lasts for more than {MAX_LIFETIME:.0f} s, "
                f"and records live twice as long; use at most {MAX_LIFETIME / 2:.0f}"
            )
        self._update_period, self._limits, self._on_shard = update_period, limits or ServerLimits(), on_shard
        self._rules, self._petals_only, self._share_prefix = rules or AccessRules(), petals_only, share_prefix

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
            ConfigurationError: the model, the span or an address is wrong.
            SwarmConnectionError: the swarm cannot be joined, or takes no record.
        """
        prefix, count = self.dht_prefix, num_blocks(self._checkpoint.config)
        if self._block_indices is not None:
            self._check_span(*self._block_indices, count)
        self.node.start()
        with ExitStack() as started:
            started.callback(self.node.close)
            on_joined()
            directory = SwarmDirectory(self.node, self._rules.token)
            start, end = self._block_indices or self._choose_span(directory, prefix, count)
            span = load_span(
                self._checkpoint,
                start,
                end,
                device=self._device,
                dtype=self._dtype,
                share_prefix=self._share_prefix,
                on_shard=self._on_shard,
            )
            compute = ComputeThread(span.transfers.mark if span.transfers.is_asynchronous else None).start()
            started.callback(compute.stop, _STOP_TIMEOUT)
            resources = ServerResources(
                span,
                compute,
                self._limits,
                info=server_info(span, self._checkpoint, self._limits),
                rules=self._rules,
                peer_id=self.node.peer_id.to_base58(),
                links=PeerLinks(self.node.p2p),
                graph_cost=measure_graph_cost(span),
                cache_bytes_per_token=measure_cache_bytes(span) if span.has_sessions else 0.0,
            )
            record = self._record(span)
            entry = ModelEntry(prefix, count, record.repository)
            announcer = Announcer(directory, entry, record, resources, self._update_period)
            server = RunningServer(self.node, resources, prefix, announcer, petals_only=self._petals_only)
            self.node.run(server.open())
            started.pop_all()
        return server

    def _check_span(self, start: int, end: int, count: int) -> None:
        if not 0 <= start < end <= count:
            raise ConfigurationError(
                f"blocks {start}:{end} do not exist: {self._checkpoint.name_or_path} has {count}, numbered 0:{count}"
            )

    def _choose_span(self, directory: SwarmDirectory, prefix: str, count: int) -> tuple[int, int]:
        length = count if self._num_blocks is None else self._num_blocks
        if length < 1:
            raise ConfigurationError(f"num_blocks is {length}: a server holds at least one block")
        table = self.node.run(directory.servers(prefix, count))
        throughput = [sum(r.throughput for r in records.values() if r.state is ServerState.ONLINE) for records in table]
        return thinnest_span(throughput, length)

    def _record(self, span: BlockSpan) -> ServerRecord:
        """The record to announce, with the speed of a small forward."""
        batch, tokens = 4, 64
        seconds = forward_seconds(span, batch, tokens)
        return ServerRecord(
            state=ServerState.ONLINE,
            throughput=self._throughput if self._throughput is not None else 1 / seconds,
            start=span.start,
            end=span.end,
            public_name=self._public_name,
            version=__version__,
            torch_dtype=str(span.dtype).removeprefix("torch."),
            tokens_per_second=batch * tokens * (span.end - span.start) / seconds,
            stream_version=None if self._petals_only else STREAM_VERSION,
            hidden_size=span.hidden_size,
            fingerprint=self._checkpoint.fingerprint,
            num_blocks=num_blocks(self._checkpoint.config),
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


def parse_block_indices(text: str) -> tuple[int, int]:
    """`a:b` as (a, b).

    Raises:
        ConfigurationError: it is not of that form.
    """
    try:
        start, end = (int(part) for part in text.split(":"))
    except ValueError as e:
        raise ConfigurationError(f"--block-indices {text!r}: give START:END, END exclusive, e.g. 0:16") from e
    return start, end
