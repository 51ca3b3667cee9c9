"""Inference sessions on a server: the keys and values of each, and the budget that they share.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of new positions.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.adapters import Adapter, by_block
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.access.limits import room_for
from petals_lightning.server.blocks.kv_cache import GrowingLayer, SpanCache
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.blocks.transfers import Transfers

_RECENT = 1.0  # seconds for which a session counts as in use after a step

SESSION_BYTES, SESSION_BLOCK_BYTES = 4096, 2048
"""Bytes of a session however short it is, and of each hosted block in it: 2,200 and 900 measured."""

SessionKey = tuple[int, Any]  # stream, the client's number of the session


@dataclass
class StepInputs:
    """The inputs of a step on the server's device. Lengths and positions include the prefix.

    Attributes:
        hidden: [B, n, H].
        length: number of positions before these.
        attention_mask: [B, length + n], or None: no padding.
        position_ids: [B, n], or None: they count from `length`.
    """

    hidden: torch.Tensor
    length: int
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None

    def padded_mask(self, length: int) -> torch.Tensor:
        """The mask [B, length + n] in a batch whose longest session has `length` positions before the new ones."""
        mask = self.attention_mask
        if mask is None:
            batch, tokens, _ = self.hidden.shape
            mask = torch.ones(batch, self.length + tokens, dtype=torch.bool, device=self.hidden.device)
        return torch.nn.functional.pad(mask, (length - self.length, 0), value=False)

    def counted_positions(self) -> torch.Tensor:
        """Position ids [B, n], as given or counted from `length`."""
        if self.position_ids is not None:
            return self.position_ids
        batch, tokens, _ = self.hidden.shape
        return torch.arange(self.length, self.length + tokens, device=self.hidden.device).expand(batch, -1)


class SessionCache:
    """Keys and values of one session in blocks [start, end): of its prefix, then of its positions.

    Args:
        span: the server's blocks.
        request: the step that opens the session.
        num_bytes: reserved for it.

    Attributes:
        lora: the adapter that acts in every step; sessions with the same one may run as one batch. None: there is none.
    """

    def __init__(self, span: BlockSpan, request: StepRequest, num_bytes: int):
        assert request.max_length is not None
        self.start, self.end, self.batch = request.start, request.end, len(request.hidden)
        self.num_bytes, self.last_used = num_bytes, time.monotonic()
        self._max_length = request.max_length
        self.last_call = 0  # id of the newest step
        self.last_size, self.last_seconds = 0, 0.0  # of the last step: positions of all samples, compute time
        adapter = request.adapter
        self.prefix_length = len(request.prefix) if request.prefix is not None else 0
        if adapter is not None and adapter.past:
            self.prefix_length = adapter.past_length
        self.lora = adapter.lora_only if adapter is not None and not adapter.lora_only.is_empty else None
        self.is_open, self._uses_long_factors = False, False
        self.position_bytes = 0.0  # keys and values of one position of all samples, once the session is open
        self._limit = span.rotary_limit
        layers = [GrowingLayer(self.prefix_length + self._max_length) for _ in span.blocks]
        self._layers = layers[self.start - span.start : self.end - span.start]
        self.cache = SpanCache(layers, self.start - span.start)

    def check(self, request: StepRequest) -> None:
        """Raises ProtocolError if the step has another shape than the session, or cannot use its keys."""
        if (request.start, request.end, len(request.hidden)) != (self.start, self.end, self.batch):
            raise ProtocolError(
                f"a step of blocks {request.start}:{request.end} with batch {len(request.hidden)} in a session of "
                f"{self.start}:{self.end} with batch {self.batch}"
            )
        if (end := request.position + request.hidden.shape[1]) > self._max_length:
            raise ProtocolError(f"position {end} is beyond the session's max_length {self._max_length}")
        if self._uses_long_factors != self.uses_long_factors(request) and request.position > 0:
            assert self._limit is not None
            raise ProtocolError(
                f"position {end}: beyond {self._limit.positions} (virtual tokens counted) this model rotates "
                "all positions by other factors: a session that crosses this limit must start again from position 0"
            )

    def holds(self, request: StepRequest) -> bool:
        """Whether all positions before the step's are held, and the prefix."""
        if not self.is_open:
            return request.max_length is not None
        return all(layer.get_seq_length() >= self.prefix_length + request.position for layer in self._layers)

    def uses_long_factors(self, request: StepRequest) -> bool:
        """Whether the step ends beyond the model's rotary limit, where other factors rotate all positions."""
        if self._limit is None:
            return False
        end = request.position + request.hidden.shape[1]
        if request.position_ids is not None:
            end = int(request.position_ids.max()) + 1
        return self._limit.uses_long_factors(self.prefix_length + end)

    @torch.inference_mode()
    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """Sample i continues from sample hypo_ids[i]. If this fails, the session is emptied."""
        try:
            for layer in self._layers:
                layer.reorder_cache(hypo_ids)
        except BaseException:
            for layer in self._layers:
                layer.crop(-layer.get_seq_length())
            raise

    @torch.inference_mode()  # a few percent faster than no_grad, which counts in steps this short
    def step(self, span: BlockSpan, request: StepRequest) -> dict[str, torch.Tensor]:
        """Runs a step's positions, after the prefix if it opens the session. For the compute thread.

        A step that failed can be run again: what it stored after its position is dropped. `request.hypo_ids` are
        ignored; see `reorder`.

        Returns:
            `hidden` [B, request.keep or n, H], and `prefix` [P, H] if requested.
        """
        if request.adapter is not None and request.adapter.past:
            self._fill(span, request.adapter)
        inputs, length = self.begin(span.transfers, request), self.prefix_length
        hidden, mask, positions = inputs.hidden, inputs.attention_mask, inputs.position_ids
        if request.prefix is not None:
            prefix = span.transfers.to_device(request.prefix).to(hidden.dtype).expand(self.batch, -1, -1)
            hidden = torch.cat([prefix, hidden], dim=1)
            if positions is not None:
                counted = torch.arange(length, device=span.device).expand(self.batch, -1)
                positions = torch.cat([counted, positions], dim=1)
        adapter = request.adapter if request.adapter is not None else self.lora
        out = span.step(
            self.start, self.end, hidden, self.cache, adapter=adapter, attention_mask=mask, position_ids=positions
        )
        outputs = self.finish(request, out)
        if request.want_prefix and request.prefix is not None:
            outputs["prefix"] = out[0, :length]  # all samples have the same
        return outputs

    def _fill(self, span: BlockSpan, adapter: Adapter) -> None:
        """Empties the session, and puts an adapter's keys and values in place of its prefix."""
        devices = span.devices[self.start - span.start : self.end - span.start]
        for layer, device, pair in zip(self._layers, devices, by_block(adapter.past), strict=True):
            layer.crop(-layer.get_seq_length())
            layer.update(*(tensor.to(device, span.dtype).expand(self.batch, -1, -1, -1) for tensor in pair))

    def begin(self, transfers: Transfers, request: StepRequest) -> StepInputs:
        """Moves a step's inputs to the device, and drops positions that are held after the step's first."""
        length = 0 if request.prefix is not None else self.prefix_length + request.position
        for layer in self._layers:
            if (dropped := layer.get_seq_length() - length) > 0:
                layer.crop(-dropped)
        hidden, mask, positions = (
            transfers.to_device(tensor) if tensor is not None else None
            for tensor in (request.hidden, request.attention_mask, request.position_ids)
        )
        assert hidden is not None
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (self.prefix_length, 0), value=True)
        if positions is not None:
            positions = positions + self.prefix_length
        return StepInputs(hidden, length, mask, positions)

    def finish(self, request: StepRequest, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """Selects the step's outputs from those of its blocks, [B, n or P + n, H]."""
        if not self.is_open:
            held = [tensor for layer in self._layers for tensor in (layer.keys, layer.values) if tensor is not None]
            self.position_bytes = sum(tensor.nbytes for tensor in held) / self._layers[0].get_seq_length()
        self.is_open, self._uses_long_factors = True, self.uses_long_factors(request)
        return {"hidden": out[:, -(request.keep or request.hidden.shape[1]) :]}


class CacheStore:
    """Sessions of all streams within a byte budget, which is reserved when they open. For the event loop only.

    Args:
        max_bytes: budget for all sessions together; its last part is for clients that hold least (`room_for`).
        lifetime: seconds after which an unused session is dropped.
        max_per_client: sessions of one client.
    """

    def __init__(self, max_bytes: int, lifetime: float, max_per_client: int):
        self.max_bytes, self._lifetime, self._max_per_client = max_bytes, lifetime, max_per_client
        self._caches: dict[SessionKey, tuple[SessionCache, str]] = {}
        self._bytes_of: Counter[str] = Counter()
        self._sessions_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def num_bytes(self) -> int:
        return self._bytes_of.total()

    def room(self, client: str = "") -> int:
        """Bytes that a new session of a client may take; by default of a client without sessions."""
        return room_for(self._bytes_of[client], taken=self.num_bytes, budget=self.max_bytes)

    def make_room(self, key: SessionKey, num_bytes: int, client: str) -> str | None:
        """Drops a session under the same key and expired ones; returns the reason if `num_bytes` still do not fit."""
        self.pop(key)
        self.expire()
        if (count := self._sessions_of[client]) >= self._max_per_client:
            return f"this client has {count} sessions open, which is the limit: end those that it needs no more"
        if num_bytes <= (room := self.room(client)):
            return None
        held = self._bytes_of[client]
        return (
            f"{room / 2**20:.1f} MiB are left for this client, which has {held / 2**20:.1f}; of this server's "
            f"{self.max_bytes / 2**20:.1f} MiB {self.num_bytes / 2**20:.1f} are taken"
        )

    def put(self, key: SessionKey, cache: SessionCache, client: str) -> None:
        self._caches[key] = cache, client
        self._bytes_of[client] += cache.num_bytes
        self._sessions_of[client] += 1

    def get(self, key: SessionKey) -> SessionCache | None:
        """The session, and marks it as used; None if it was never opened, has expired or was ended."""
        if key not in self._caches:
            return None
        cache, _ = self._caches[key]
        cache.last_used = time.monotonic()
        return cache

    def is_alone(self, key: SessionKey) -> bool:
        """Whether no other session is in use."""
        recent = time.monotonic() - _RECENT
        return not any(other != key and cache.last_used > recent for other, (cache, _) in self._caches.items())

    def pop(self, key: SessionKey) -> None:
        if key in self._caches:
            cache, client = self._caches.pop(key)
            for counter, amount in ((self._bytes_of, cache.num_bytes), (self._sessions_of, 1)):
                counter[client] -= amount
                if not counter[client]:
                    del counter[client]

    def drop_stream(self, stream: int) -> None:
        """Frees the sessions of a stream that has ended."""
        for key in [key for key in self._caches if key[0] == stream]:
            self.pop(key)

    def expire(self) -> None:
        """Drops sessions unused for `lifetime`."""
        oldest = time.monotonic() - self._lifetime
        for key in [key for key, (cache, _) in self._caches.items() if cache.last_used < oldest]:
            self.pop(key)


def measure_cache_bytes(span: BlockSpan) -> float:
    """Bytes of keys and values per position and block, counted on a small step."""
    tokens = 4
    hidden = torch.zeros(1, tokens, span.hidden_size, device=span.device, dtype=span.dtype)
    layers = [GrowingLayer(tokens) for _ in span.blocks]
    with torch.no_grad():
        span.step(span.start, span.end, hidden, SpanCache(layers, 0))
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.nbytes for tensor in held) / (tokens * len(layers))
