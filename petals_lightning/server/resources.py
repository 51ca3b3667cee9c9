"""What all streams of a server share: the span, its compute thread and its budgets."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from petals_lightning.errors import ProtocolError, is_out_of_memory
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.quotas import Quotas
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.blocks.graphs import GraphCost, GraphStore
from petals_lightning.server.blocks.held_adapters import HeldAdapters
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.peer_links import PeerLinks
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.sessions.session_cache import (
    SESSION_BLOCK_BYTES,
    SESSION_BYTES,
    CacheStore,
    SessionCache,
    SessionKey,
)

logger = logging.getLogger(__name__)


class ServerResources:
    """What all streams of a server share.

    Args:
        span: the blocks.
        compute: the thread that runs them, started.
        limits: budgets.
        info: the answer to `info`.
        adapters: held for all clients; none by default.
        rules: who may use the server; everybody by default.
        peer_id: the server's base58 id.
        links: streams to other servers; None: this server hands nothing over.
        graph_cost: bytes of a kept graph.
        cache_bytes_per_token: bytes of keys and values per position and block; 0 if the family has no sessions.

    Attributes:
        stream_numbers: numbers for streams, which name the graphs and caches that a stream leaves on the server.
        leaving: the server is shutting down and takes no new requests.
        open_requests: requests that are not answered yet, of all clients.
        refusals: how many requests were refused or failed, by error code.
        positions: of all requests that were admitted, prompts included.
    """

    def __init__(
        self,
        span: BlockSpan,
        compute: ComputeThread,
        limits: ServerLimits,
        info: dict[str, Any],
        *,
        adapters: HeldAdapters | None = None,
        rules: AccessRules | None = None,
        peer_id: str = "",
        links: PeerLinks | None = None,
        graph_cost: GraphCost = GraphCost(0.0, 0.0),  # noqa: B008 (it is frozen)
        cache_bytes_per_token: float = 0.0,
    ):
        self.span, self.compute, self.limits, self.info = span, compute, limits, info
        self.adapters = adapters or HeldAdapters()
        self.rules, self.peer_id, self.links = rules or AccessRules(), peer_id, links
        self.graph_cost, self.cache_bytes_per_token = graph_cost, cache_bytes_per_token
        self.stream_numbers = itertools.count()
        self.quotas = Quotas(limits)
        self.graphs = GraphStore(limits.graph_bytes, limits.graph_lifetime)
        self.caches = CacheStore(limits.cache_bytes, limits.cache_lifetime, limits.max_sessions_per_client)
        self.leaving = False
        self.open_requests = self.positions = 0
        self.refusals: Counter[ErrorCode] = Counter()

    def with_held(self, adapter: Adapter) -> Adapter:
        """An adapter with the tensors of the active one that it only names. Raises Refusal if that is not held."""
        if adapter.active is None or adapter.active.name is None:
            return adapter
        held = self.adapters.acting(adapter.active.name, adapter.start, adapter.end)
        return replace(adapter, active=held.active) if adapter.tensors() else held

    def petals_adapter(self, start: int, end: int, prompts: torch.Tensor | None, active: str | None) -> Adapter | None:
        """What a Petals client adds to blocks [start, end): deep prompts, and an adapter that is held.

        Raises:
            Refusal: no adapter of this name is held.
        """
        if active is None:
            return Adapter(start, end, prompts) if prompts is not None else None
        acting = self.adapters.acting(active, start, end)
        return replace(acting, deep=prompts) if prompts is not None else acting

    def graph_size(self, request: ForwardRequest) -> int:
        """Estimated bytes of the request's autograd graph."""
        batch, tokens, _ = request.hidden.shape
        prefix, blocks = _length(request.prefix), request.end - request.start
        own, past = 0, request.adapter.past_length if request.adapter is not None else 0
        if past:
            prefix = past
        elif not self.span.shares_prefix(prefix, tokens):
            tokens += prefix
        elif prefix:  # the prefix's own pass; later micro-batches may share it, but this may be the only one
            own = self.graph_cost.num_bytes(blocks=blocks, batch=1, queries=prefix, keys=prefix)
        own += self._lora_size(request, batch * tokens + prefix)
        return own + self.graph_cost.num_bytes(blocks=blocks, batch=batch, queries=tokens, keys=tokens + prefix)

    def _lora_size(self, request: ForwardRequest, positions: int) -> int:
        """Bytes that LoRA adds to a graph, which keeps the inputs of its factors. A frozen linear keeps none."""
        lora = request.adapter.lora if request.adapter is not None else ()
        features = sum(len(factors.blocks) * sum(factors.a.shape[1:]) for factors in lora)
        return positions * features * self.span.dtype.itemsize

    def cache_size(self, request: StepRequest) -> int:
        """Bytes to reserve for the session that a request opens: keys and values at full length, and LoRA."""
        assert request.max_length is not None
        past = request.adapter.past_length if request.adapter is not None else 0
        positions = request.max_length + _length(request.prefix) + past
        blocks = request.end - request.start
        keys_and_values = int(len(request.hidden) * positions * blocks * self.cache_bytes_per_token)
        kept = request.adapter.lora_only.num_bytes if request.adapter is not None else 0
        return kept + max(keys_and_values, SESSION_BYTES + len(self.span.blocks) * SESSION_BLOCK_BYTES)

    @property
    def cache_tokens_left(self) -> int:
        """Positions of one block whose keys and values a new client may keep here; 0 if the family has no sessions."""
        return int(self.caches.room() / self.cache_bytes_per_token) if self.cache_bytes_per_token else 0

    def open_cache(self, key: SessionKey, request: StepRequest, client: str) -> None:
        """Reserves memory for the session that a request opens.

        Raises:
            Refusal: there is not enough.
            ProtocolError: the family has no sessions.
        """
        if not self.span.has_sessions:
            raise ProtocolError(
                f"{type(self.span.model).__name__} ({self.span.model.config.model_type}) keeps more than keys and "
                "values, which inference sessions do not support: it is served for training and evaluation; load the "
                "model locally to generate"
            )
        size = self.cache_size(request)
        if (reason := self.caches.make_room(key, size, client)) is not None:
            raise Refusal(
                ErrorCode.OVERLOADED,
                f"no room for the keys and values of {len(request.hidden)} × {request.max_length} positions, which "
                f"may take {size / 2**20:.1f} MiB: {reason}",
            )
        self.caches.put(key, SessionCache(self.span, request, size), client)

    def check_size(self, start: int, end: int, hidden: torch.Tensor, prefix: torch.Tensor | None = None) -> None:
        """Checks a request against the span and the limits. Raises Refusal or ProtocolError."""
        if not self.span.start <= start < end <= self.span.end:
            raise Refusal(
                ErrorCode.NOT_SERVED,
                f"blocks {start}:{end} are not held here, this server has {self.span.start}:{self.span.end}",
            )
        batch, tokens, hidden_size = hidden.shape
        if hidden_size != self.span.hidden_size:
            raise ProtocolError(f"hidden size {hidden_size}, the model here has {self.span.hidden_size}")
        positions = batch * (max(tokens, 1) + _length(prefix))
        if positions > self.limits.max_batch_tokens:
            raise ProtocolError(
                f"{positions} tokens in one request, this server takes up to {self.limits.max_batch_tokens}: "
                "use smaller batches or micro-batches"
            )
        self.span.shares_prefix(_length(prefix), tokens)  # raises for a length that the model cannot run
        self.positions += positions

    def refusal(self, error: Exception, peer: str) -> Refusal:
        """What to tell a client whose request ended in an error. Logs errors that are the server's own."""
        refusal = self._refusal(error, peer)
        self.refusals[refusal.code] += 1
        return refusal

    def _refusal(self, error: Exception, peer: str) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, ProtocolError):
            return Refusal(ErrorCode.BAD_REQUEST, str(error))
        if is_out_of_memory(error):
            self.graphs.clear()
            logger.warning("out of memory in a request of …%s: all kept graphs were dropped", peer[-6:])
            return Refusal(ErrorCode.OVERLOADED, "out of memory")
        logger.error("a request of …%s failed", peer[-6:], exc_info=error)
        # Only the error's type: its text may show memory contents or paths of this machine.
        message = f"the server failed on this request ({type(error).__name__}; details are in its log)"
        return Refusal(ErrorCode.INTERNAL, message)


def _length(prefix: torch.Tensor | None) -> int:
    return len(prefix) if prefix is not None else 0
