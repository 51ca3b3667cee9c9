"""Decoding steps of several sessions, run as one batch.

A step of few positions takes as long as reading the weights. Steps that wait at the same time share that reading.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of new positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.blocks.kv_cache import SpanCache, StackedLayer
from petals_lightning.server.blocks.self_checks import same_outputs, telling_blocks
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import Batchable, Priority
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.sessions.session_cache import SessionCache

_MAX_POSITIONS = 32  # B·n of a batch: with more, arithmetic takes longer than reading weights
_BRIEF = 0.01  # seconds for which the event loop may block
_COPYING = 3  # stacked keys and values are read, written and read again

Outputs = dict[str, torch.Tensor]


class DecodeStep(Batchable[Outputs]):
    """One step of a session. Its outputs are those of `SessionCache.step`, ready to send.

    Args:
        span: the server's blocks.
        cache: the session, which has checked the request.
        request: the step.
        is_alone: no other session is in use. The step is then brief if the session's last one was, and was no smaller.
    """

    def __init__(self, span: BlockSpan, cache: SessionCache, request: StepRequest, *, is_alone: bool = False):
        self._span, self._cache, self._request = span, cache, request
        self.size = len(request.hidden) * request.hidden.shape[1]
        self.priority = Priority.DECODE if self.size <= _MAX_POSITIONS else Priority.PREFILL
        self.is_brief = is_alone and self.size <= cache.last_size and cache.last_seconds < _BRIEF
        self._uses_long_factors = cache.uses_long_factors(request)
        self._hypo_ids = request.hypo_ids

    def __call__(self) -> Outputs:
        """Runs it by itself.

        Raises:
            Refusal: positions before the step's are not held.
        """
        if not self._cache.holds(self._request):
            raise Refusal(ErrorCode.CACHE_LOST, f"the session holds fewer than {self._request.position} positions")
        self._reorder()
        began = time.perf_counter()
        outputs = self._on_the_wire(self._cache.step(self._span, self._request))
        self._cache.last_size, self._cache.last_seconds = self.size, time.perf_counter() - began
        return outputs

    def can_batch(self, others: Sequence[Batchable[Outputs]]) -> bool:
        cache, request = self._cache, self._request
        if not (self._span.batches_sessions and cache.is_open and request.adapter is None and cache.holds(request)):
            return False
        steps = [*(other for other in others if isinstance(other, DecodeStep)), self]
        if len({step._kind for step in steps}) > 1 or len({id(step._cache) for step in steps}) < len(steps):
            return False
        if sum(step.size for step in steps) > _MAX_POSITIONS:
            return False
        return self._bytes_moved(steps) <= self._bytes_moved(steps[:-1]) + self._bytes_moved([self])

    def run_batch(self, others: Sequence[Batchable[Outputs]]) -> list[Outputs]:
        steps = [self, *(other for other in others if isinstance(other, DecodeStep))]
        for step in steps:
            step._reorder()
        outputs = run_batched(self._span, [(step._cache, step._request) for step in steps])
        return [step._on_the_wire(own) for step, own in zip(steps, outputs, strict=True)]

    @property
    def _kind(self) -> tuple[int, int, int, bool, Adapter | None]:
        """Equal for steps that can be one batch."""
        request, lora = self._request, self._cache.lora
        return request.start, request.end, request.hidden.shape[1], self._uses_long_factors, lora

    def _bytes_moved(self, steps: Sequence[DecodeStep]) -> float:
        """Bytes that a batch of steps reads and writes in memory; its run time is proportional."""
        if not steps:
            return 0.0
        length = max(
            step._cache.prefix_length + step._request.position + step._request.hidden.shape[1] for step in steps
        )
        stacked = length * sum(step._cache.position_bytes for step in steps)
        weights = self._span.weight_bytes(self._request.start, self._request.end)
        return weights + stacked * (_COPYING if len(steps) > 1 else 1)

    def _reorder(self) -> None:
        hypo_ids, self._hypo_ids = self._hypo_ids, None  # once, even if the step runs again
        if hypo_ids is not None:
            self._cache.reorder(hypo_ids)

    def _on_the_wire(self, outputs: Outputs) -> Outputs:
        return self._span.transfers.outputs_to_wire(outputs, self._request.wire_dtype)


@torch.inference_mode()
def run_batched(span: BlockSpan, steps: Sequence[tuple[SessionCache, StepRequest]]) -> list[dict[str, torch.Tensor]]:
    """Runs steps of several open sessions as one batch. All have the same blocks, n and LoRA.

    Sessions of different lengths are aligned at the end, like samples padded on the left.

    Returns:
        The outputs of `SessionCache.step` for each.
    """
    first, batches = steps[0][0], [cache.batch for cache, _ in steps]
    begun = [cache.begin(span.transfers, request) for cache, request in steps]
    longest = max(inputs.length for inputs in begun)
    mask = positions = None
    if any(inputs.length < longest or inputs.attention_mask is not None for inputs in begun):
        mask = torch.cat([inputs.padded_mask(longest) for inputs in begun])
    if mask is not None or any(inputs.position_ids is not None for inputs in begun):
        positions = torch.cat([inputs.counted_positions() for inputs in begun])
    scratch: dict[Any, torch.Tensor] = {}
    layers = zip(*(cache.cache.attention_layers for cache, _ in steps), strict=True)
    stacked = SpanCache([StackedLayer(own, batches, scratch) for own in layers], first.start - span.start)
    hidden = torch.cat([inputs.hidden.to(span.dtype) for inputs in begun])
    out = span.step(
        first.start, first.end, hidden, stacked, adapter=first.lora, attention_mask=mask, position_ids=positions
    )
    return [cache.finish(request, own) for (cache, request), own in zip(steps, out.split(batches), strict=True)]


def verify_batched_decoding(span: BlockSpan) -> bool:
    """Whether sessions of different lengths give the same as one batch as one by one, on random hidden states.

    False for families whose blocks keep another state than keys and values, or do not support padding on the left.
    """
    start, end = telling_blocks(span)

    def outputs(batched: bool) -> torch.Tensor:
        steps, draw = [], torch.Generator().manual_seed(0)
        for batch, length in ((1, 2), (2, 5), (1, 5)):
            hidden = torch.randn(batch, length + 1, span.hidden_size, generator=draw)
            opening = StepRequest(0, start, end, hidden[:, :length], 0, max_length=length + 1)
            cache = SessionCache(span, opening, num_bytes=0)
            cache.step(span, opening)
            steps.append((cache, StepRequest(0, start, end, hidden[:, length:], length)))
        results = run_batched(span, steps) if batched else [cache.step(span, request) for cache, request in steps]
        return torch.cat([own["hidden"] for own in results])

    return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
