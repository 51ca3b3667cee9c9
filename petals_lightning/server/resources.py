"""What all streams of a server share: the span, its compute thread, its budgets, and how it refuses."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.quotas import Accounts
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.blocks.graphs import GraphCost, GraphStore
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.peer_links import Links
from petals_lightning.server.sessions.session_cache import (
    SESSION_BLOCK_BYTES,
    SESSION_BYTES,
    CacheStore,
    SessionCache,
    SessionKey,
)

if TYPE_CHECKING:
    from petals_lightning.server.client_stream import Session

logger = logging.getLogger(__name__)

stream_numbers = itertools.count()
"""Names what a stream leaves on the server: graphs, caches."""


class Refusal(Exception):
    """Ends a request with an error code and words for the client."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code


class Backend:
    """What all sessions of a server share: the span, its compute thread, its budgets."""

    def __init__(
        self,
        span: BlockSpan,
        compute: ComputeThread,
        limits: ServerLimits,
        info: dict[str, Any],
        *,
        rules: AccessRules | None = None,
        peer_id: str = "",
        links: Links | None = None,
    ):
        self.span, self.compute, self.limits, self.info = span, compute, limits, info
        self.rules, self.peer_id, self.links = rules or AccessRules(), peer_id, links
        self.sessions: dict[int, Session] = {}
        self.accounts = Accounts(limits)
        self.graphs = GraphStore(limits.graph_bytes, limits.graph_lifetime)
        self.graph_cost = GraphCost(0.0, 0.0)
        self.caches = CacheStore(limits.cache_bytes, limits.cache_lifetime, limits.max_sessions_per_client)
        self.cache_bytes_per_token = 0.0
        self.leaving = False
        self.under_way = 0

    def graph_size(self, request: ForwardRequest) -> int:
        """Estimated bytes of the request's autograd graph."""
        batch, tokens, _ = request.hidden.shape
        prefix, blocks = _length(request.prefix), request.end - request.start
        own = 0
        if not self.span.shares_prefix(prefix, tokens):
            tokens += prefix
        elif prefix:  # its own pass; other micro-batches may share it, but this may be the only one
            own = self.graph_cost.num_bytes(blocks=blocks, batch=1, queries=prefix, keys=prefix)
        return own + self.graph_cost.num_bytes(blocks=blocks, batch=batch, queries=tokens, keys=tokens + prefix)

    def cache_size(self, request: StepRequest) -> int:
        """Bytes that the session opened by a request may come to hold, or takes in any case."""
        assert request.max_length is not None
        positions = request.max_length + _length(request.prefix)
        blocks = request.end - request.start
        keys_and_values = int(len(request.hidden) * positions * blocks * self.cache_bytes_per_token)
        return max(keys_and_values, SESSION_BYTES + len(self.span.blocks) * SESSION_BLOCK_BYTES)

    @property
    def cache_tokens_left(self) -> int:
        """Positions of one block whose keys and values a new client may keep here; 0 where none are kept."""
        return int(self.caches.room() / self.cache_bytes_per_token) if self.cache_bytes_per_token else 0

    def open_cache(self, key: SessionKey, request: StepRequest, client: str) -> None:
        """Reserves room for the session that a request opens.

        Raises:
            Refusal: there is too little.
            ProtocolError: the family has no sessions.
        """
        if not self.span.has_sessions:
            raise ProtocolError(
                f"{type(self.span.model).__name__} ({self.span.model.config.model_type}) keeps more than keys and "
                "values, which inference sessions do not support: it is served for training and evaluation; load the "
                "model locally to generate"
            )
        size = self.cache_size(request)
        if (refusal := self.caches.make_room(key, size, client)) is not None:
            raise Refusal(
                ErrorCode.OVERLOADED,
                f"no room for the keys and values of {len(request.hidden)} × {request.max_length} positions, which "
                f"may take {size / 2**20:.1f} MiB: {refusal}",
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
        positions = batch * (max(tokens, 1) + (len(prefix) if prefix is not None else 0))
        if positions > self.limits.max_batch_tokens:
            raise ProtocolError(
                f"{positions} tokens in one request, this server takes up to {self.limits.max_batch_tokens}: "
                "use smaller batches or micro-batches"
            )
        self.span.shares_prefix(len(prefix) if prefix is not None else 0, tokens)  # refuses impossible lengths

    def refusal(self, error: Exception, peer: str) -> Refusal:
        """What a client is told when its request ended in an error."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, ProtocolError):
            return Refusal(ErrorCode.BAD_REQUEST, str(error))
        if isinstance(error, torch.OutOfMemoryError):
            self.graphs.clear()
            logger.warning("out of memory in a request of …%s: all kept graphs were dropped", peer[-6:])
            return Refusal(ErrorCode.OVERLOADED, "out of memory")
        logger.error("a request of …%s failed", peer[-6:], exc_info=error)
        # The kind of the error, not its text: what is in this machine's memory or paths is not the client's.
        words = f"the server failed on this request ({type(error).__name__}; details are in its log)"
        return Refusal(ErrorCode.INTERNAL, words)


def _length(prefix: torch.Tensor | None) -> int:
    return len(prefix) if prefix is not None else 0
