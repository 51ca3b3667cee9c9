"""Autograd graphs that wait for their backward, within a byte budget: oldest out first, and none lives long."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch

from petals_lightning.server.span import BlockSpan, SpanGraph, SpanInputs

GraphKey = tuple[int, int]  # stream, call id


class GraphStore:
    """Keeps graphs by (stream, call id). Not thread-safe: used from the event loop only.

    Args:
        max_bytes: budget for all graphs together.
        lifetime: seconds after which a graph is dropped.
    """

    def __init__(self, max_bytes: int, lifetime: float):
        self.max_bytes, self._lifetime = max_bytes, lifetime
        self._graphs: OrderedDict[GraphKey, tuple[SpanGraph, float]] = OrderedDict()
        self.num_bytes = 0

    def put(self, key: GraphKey, graph: SpanGraph) -> None:
        """Keeps a graph, in place of one under the same key, and drops the oldest beyond the budget."""
        self.pop(key)
        self._graphs[key] = graph, time.monotonic() + self._lifetime
        self.num_bytes += graph.num_bytes
        self.expire()
        self.make_room(0)  # other forwards may have been admitted into the same room meanwhile

    def make_room(self, num_bytes: int) -> bool:
        """Drops the oldest graphs until `num_bytes` fit; False if they never will."""
        if num_bytes > self.max_bytes:
            return False
        while self._graphs and self.num_bytes + num_bytes > self.max_bytes:
            self.pop(next(iter(self._graphs)))
        return True

    def pop(self, key: GraphKey) -> SpanGraph | None:
        if key not in self._graphs:
            return None
        graph, _ = self._graphs.pop(key)
        self.num_bytes -= graph.num_bytes
        return graph

    def drop_stream(self, stream: int) -> None:
        """Frees the graphs of a stream that has ended."""
        for key in [key for key in self._graphs if key[0] == stream]:
            self.pop(key)

    def clear(self) -> None:
        self._graphs.clear()
        self.num_bytes = 0

    def expire(self) -> None:
        """Drops graphs that have outlived their time."""
        now = time.monotonic()
        for key in [key for key, (_, until) in self._graphs.items() if until < now]:
            self.pop(key)


@dataclass(frozen=True)
class GraphCost:
    """Bytes of a kept graph per block: `per_token` for each position, `per_pair` for each query and key of a sample.

    The second matters where attention weights are kept ("eager" attention: BLOOM, Gemma 2, GPT-J).
    """

    per_token: float
    per_pair: float

    def num_bytes(self, *, blocks: int, batch: int, queries: int, keys: int) -> int:
        """Estimate for [batch, queries] positions that attend to `keys` positions, over `blocks` blocks."""
        return int(blocks * batch * (queries * self.per_token + queries * keys * self.per_pair))


def measure_graph_cost(span: BlockSpan) -> GraphCost:
    """Counts the bytes of small graphs of two lengths, and takes the rest from them."""
    short, long = 16, 48
    bytes_short, bytes_long = (_graph_bytes(span, tokens) for tokens in (short, long))
    per_pair = max(0.0, (bytes_long / long - bytes_short / short) / (long - short))
    return GraphCost(per_token=bytes_short / short - short * per_pair, per_pair=per_pair)


def _graph_bytes(span: BlockSpan, tokens: int) -> float:
    """Bytes per sample and block of the tensors that autograd saves, each storage once, without the weights."""
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
