"""Autograd graphs that wait for their backward, within a byte budget."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from petals_lightning.server.blocks.span import BlockSpan, SpanGraph, SpanInputs

GraphKey = tuple[int, int]  # stream, call id

_BESIDES_TENSORS = 1.05  # adds autograd's own nodes and heap fragmentation (1.03 measured)


@dataclass(frozen=True)
class _Kept:
    graph: SpanGraph
    client: str
    until: float  # of the store's clock


class GraphStore:
    """Keeps graphs by (stream, call id). Not thread-safe: for the event loop only.

    Beyond the budget, the client that has most loses its oldest graph.

    Args:
        max_bytes: budget for all graphs together.
        lifetime: seconds after which a graph is dropped.
        clock: seconds that have passed since some moment.
    """

    def __init__(self, max_bytes: int, lifetime: float, clock: Callable[[], float] = time.monotonic):
        self.max_bytes, self._lifetime, self._clock = max_bytes, lifetime, clock
        self._graphs: OrderedDict[GraphKey, _Kept] = OrderedDict()
        self._bytes_of: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._bytes_of.total()

    def put(self, key: GraphKey, graph: SpanGraph, client: str = "") -> None:
        """Keeps a graph, replaces one under the same key, and drops others beyond the budget."""
        self.pop(key)
        self._graphs[key] = _Kept(graph, client, self._clock() + self._lifetime)
        self._bytes_of[client] += graph.num_bytes
        self.expire()
        self.make_room(0)  # other forwards may have been admitted for the same bytes meanwhile

    def make_room(self, num_bytes: int) -> bool:
        """Drops graphs until `num_bytes` fit; False if they are more than the whole budget."""
        if num_bytes > self.max_bytes:
            return False
        while self._graphs and self.num_bytes + num_bytes > self.max_bytes:
            greediest = max(self._bytes_of, key=self._bytes_of.__getitem__)
            self.pop(next(key for key, kept in self._graphs.items() if kept.client == greediest))
        return True

    def pop(self, key: GraphKey) -> SpanGraph | None:
        if key not in self._graphs:
            return None
        kept = self._graphs.pop(key)
        self._bytes_of[kept.client] -= kept.graph.num_bytes
        if not self._bytes_of[kept.client]:
            del self._bytes_of[kept.client]
        return kept.graph

    def drop_stream(self, stream: int) -> None:
        """Frees the graphs of a stream that has ended."""
        for key in [key for key in self._graphs if key[0] == stream]:
            self.pop(key)

    def clear(self) -> None:
        self._graphs.clear()
        self._bytes_of.clear()

    def expire(self) -> None:
        """Drops graphs older than `lifetime`."""
        now = self._clock()
        for key in [key for key, kept in self._graphs.items() if kept.until < now]:
            self.pop(key)


@dataclass(frozen=True)
class GraphCost:
    """Bytes of a kept graph per block: `per_token` for each position, `per_pair` for each query–key pair of a sample.

    `per_pair` matters where attention weights are kept ("eager" attention: BLOOM, Gemma 2, GPT-J).
    """

    per_token: float
    per_pair: float

    def num_bytes(self, *, blocks: int, batch: int, queries: int, keys: int) -> int:
        """Estimate for [batch, queries] positions that attend to `keys` positions, in `blocks` blocks."""
        tensors = blocks * batch * (queries * self.per_token + queries * keys * self.per_pair)
        return int(tensors * _BESIDES_TENSORS)


def measure_graph_cost(span: BlockSpan) -> GraphCost:
    """Counts the bytes of two small graphs of different lengths, and solves for both costs."""
    short, long = 16, 48
    bytes_short, bytes_long = (_graph_bytes(span, tokens) for tokens in (short, long))
    per_pair = max(0.0, (bytes_long / long - bytes_short / short) / (long - short))
    return GraphCost(per_token=bytes_short / short - short * per_pair, per_pair=per_pair)


def _graph_bytes(span: BlockSpan, tokens: int) -> float:
    """Bytes per sample and block of the tensors that autograd saves: each storage once, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in span.model.parameters()}
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = 2
    hidden = torch.randn(batch, tokens, span.hidden_size, device=span.device, dtype=span.dtype)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        graph = span.forward_with_graph(SpanInputs(span.start, span.end, hidden), input_grad=True)
    del graph
    return sum(storages.values()) / (batch * (span.end - span.start))
