"""Inference sessions on a server: the keys and values of each, and the budget that they share.

Shapes: B batch, n new positions, P virtual tokens, H hidden size.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.kv_cache import GrowingLayer, SpanCache
from petals_lightning.server.span import BlockSpan

SessionKey = tuple[int, Any]  # stream, the client's number of the session


class SessionCache:
    """Keys and values of one session in blocks [start, end): of its prefix, then of its positions.

    Args:
        span: the server's blocks.
        request: the step that opens the session.
        num_bytes: what is reserved for it.
    """

    def __init__(self, span: BlockSpan, request: StepRequest, num_bytes: int):
        assert request.max_length is not None
        self.start, self.end, self.batch = request.start, request.end, len(request.hidden)
        self.num_bytes, self.last_used = num_bytes, time.monotonic()
        self._max_length = request.max_length
        self.last_call = 0  # id of the newest step
        self._prefix_length = len(request.prefix) if request.prefix is not None else 0
        self._is_open, self._is_beyond = False, False
        self._limit = span.rotary_limit
        layers = [GrowingLayer(self._prefix_length + self._max_length) for _ in span.blocks]
        self._layers = layers[self.start - span.start : self.end - span.start]
        self._cache = SpanCache(layers, self.start - span.start)

    def check(self, request: StepRequest) -> None:
        """Raises ProtocolError if the step is of another shape than the session, or cannot go on with its keys."""
        if (request.start, request.end, len(request.hidden)) != (self.start, self.end, self.batch):
            raise ProtocolError(
                f"a step of blocks {request.start}:{request.end} with batch {len(request.hidden)} in a session of "
                f"{self.start}:{self.end} with batch {self.batch}"
            )
        if (end := request.position + request.hidden.shape[1]) > self._max_length:
            raise ProtocolError(f"position {end} is beyond the session's max_length {self._max_length}")
        if self._is_beyond != self._turns_beyond(request) and request.position > 0:
            assert self._limit is not None
            raise ProtocolError(
                f"position {end}: beyond {self._limit.positions} (virtual tokens counted) this model turns all "
                "positions by other rotary factors: a session that comes there or back must start anew from position 0"
            )

    def holds(self, request: StepRequest) -> bool:
        """Whether all positions before those of the step are here (and the prefix, once it was computed)."""
        if not self._is_open:
            return request.max_length is not None
        return all(layer.get_seq_length() >= self._prefix_length + request.position for layer in self._layers)

    def _turns_beyond(self, request: StepRequest) -> bool:
        if self._limit is None:
            return False
        end = request.position + request.hidden.shape[1]
        if request.position_ids is not None:
            end = int(request.position_ids.max()) + 1
        return self._limit.is_beyond(self._prefix_length + end)

    @torch.inference_mode()  # a few percent faster than no_grad, which counts in steps this short
    def step(self, span: BlockSpan, request: StepRequest) -> dict[str, torch.Tensor]:
        """Runs a step's positions, behind the prefix if it opens the session. For the compute thread.

        Returns:
            `hidden` [B, request.keep or n, H], and `prefix` [P, H] if wanted.
        """
        device = span.device
        hidden, mask, positions = (
            tensor.to(device) if tensor is not None else None
            for tensor in (request.hidden, request.attention_mask, request.position_ids)
        )
        assert hidden is not None
        length = self._prefix_length
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (length, 0), value=True)
        if positions is not None:
            positions = positions + length
        if request.prefix is not None:
            prefix = request.prefix.to(device, hidden.dtype).expand(self.batch, -1, -1)
            hidden = torch.cat([prefix, hidden], dim=1)
            if positions is not None:
                counted = torch.arange(length, device=device).expand(self.batch, -1)
                positions = torch.cat([counted, positions], dim=1)
        before = 0 if request.prefix is not None else length + request.position
        for layer in self._layers:
            layer.crop(min(before - layer.get_seq_length(), 0))
            if request.hypo_ids is not None:
                layer.reorder_cache(request.hypo_ids)
        deep = request.deep.to(device) if request.deep is not None else None
        out = span.step(
            self.start, self.end, hidden, self._cache, deep=deep, attention_mask=mask, position_ids=positions
        )
        self._is_open, self._is_beyond = True, self._turns_beyond(request)
        outputs = {"hidden": out[:, -(request.keep or request.hidden.shape[1]) :]}
        if request.want_prefix and request.prefix is not None:
            outputs["prefix"] = out[0, :length]  # the same in every sample
        return outputs


class CacheStore:
    """Sessions of all streams within a budget of bytes, reserved when they open. For the event loop only.

    Args:
        max_bytes: budget for all sessions together.
        lifetime: seconds after which a session that is not used is dropped.
    """

    def __init__(self, max_bytes: int, lifetime: float):
        self.max_bytes, self._lifetime = max_bytes, lifetime
        self._caches: dict[SessionKey, SessionCache] = {}

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - sum(cache.num_bytes for cache in self._caches.values())

    def make_room(self, key: SessionKey, num_bytes: int) -> bool:
        """Drops an older session under the same key and expired ones; whether `num_bytes` fit then."""
        self.pop(key)
        self.expire()
        return num_bytes <= self.free_bytes

    def put(self, key: SessionKey, cache: SessionCache) -> None:
        self._caches[key] = cache

    def get(self, key: SessionKey) -> SessionCache | None:
        """The session, which counts as used now; None if it was never opened, has expired or was ended."""
        if (cache := self._caches.get(key)) is not None:
            cache.last_used = time.monotonic()
        return cache

    def pop(self, key: SessionKey) -> None:
        self._caches.pop(key, None)

    def drop_stream(self, stream: int) -> None:
        """Frees the sessions of a stream that has ended."""
        for key in [key for key in self._caches if key[0] == stream]:
            self.pop(key)

    def expire(self) -> None:
        """Drops sessions that nobody has used for too long."""
        oldest = time.monotonic() - self._lifetime
        for key in [key for key, cache in self._caches.items() if cache.last_used < oldest]:
            self.pop(key)


def measure_cache_bytes(span: BlockSpan) -> float:
    """Bytes of keys and values per position and block, counted on a small step, whatever the family keeps."""
    tokens = 4
    hidden = torch.zeros(1, tokens, span.hidden_size, device=span.device, dtype=span.dtype)
    layers = [GrowingLayer(tokens) for _ in span.blocks]
    with torch.no_grad():
        span.step(span.start, span.end, hidden, SpanCache(layers, 0))
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.nbytes for tensor in held) / (tokens * len(layers))
