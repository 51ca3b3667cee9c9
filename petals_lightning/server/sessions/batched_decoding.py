"""Steps of several sessions, run as one batch.

A step of few positions takes as long as reading the weights. Steps that wait at the same time share that reading.

Shapes: B batch, n new positions, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.blocks.kv_cache import SpanCache, StackedLayer
from petals_lightning.server.blocks.self_checks import same_outputs
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import JointWork, Priority
from petals_lightning.server.resources import Refusal
from petals_lightning.server.sessions.session_cache import SessionCache

_MAX_POSITIONS = 32  # B·n of a joint step: with more, arithmetic takes longer than reading weights
_BRIEF = 0.01  # seconds for which nobody minds an event loop that stands still
_COPYING = 3  # keys and values are read, written and read again where they are stacked

Outputs = dict[str, torch.Tensor]


class SessionStep(JointWork[Outputs]):
    """A step, whose outputs are those of `SessionCache.step` as they travel.

    Args:
        span: the server's blocks.
        cache: the session, which has checked the request.
        is_alone: no other session is in use, whose steps could join. It is brief then if the session's last step was,
            and it is no larger.
    """

    def __init__(self, span: BlockSpan, cache: SessionCache, request: StepRequest, *, is_alone: bool = False):
        self._span, self._cache, self._request = span, cache, request
        self.size = len(request.hidden) * request.hidden.shape[1]
        self.priority = Priority.DECODE if self.size <= _MAX_POSITIONS else Priority.PREFILL
        self.is_brief = is_alone and self.size <= cache.last_size and cache.last_seconds < _BRIEF
        self._is_beyond = cache.turns_beyond(request)
        self._hypo_ids = request.hypo_ids

    def __call__(self) -> Outputs:
        """Runs it alone.

        Raises:
            Refusal: positions before the step's are not held.
        """
        if not self._cache.holds(self._request):
            words = f"the session holds fewer than {self._request.position} positions"
            raise Refusal(ErrorCode.CACHE_LOST, words)
        self._reorder()
        began = time.perf_counter()
        outputs = self._on_the_wire(self._cache.step(self._span, self._request))
        self._cache.last_size, self._cache.last_seconds = self.size, time.perf_counter() - began
        return outputs

    def joins(self, others: Sequence[JointWork[Outputs]]) -> bool:
        cache, request = self._cache, self._request
        if not (self._span.joins_steps and cache.is_open and request.deep is None and cache.holds(request)):
            return False
        steps = [*(other for other in others if isinstance(other, SessionStep)), self]
        if len({step._kind for step in steps}) > 1 or len({id(step._cache) for step in steps}) < len(steps):
            return False
        if sum(step.size for step in steps) > _MAX_POSITIONS:
            return False
        return self._bytes_moved(steps) <= self._bytes_moved(steps[:-1]) + self._bytes_moved([self])

    def run_with(self, others: Sequence[JointWork[Outputs]]) -> list[Outputs]:
        steps = [self, *(other for other in others if isinstance(other, SessionStep))]
        for step in steps:
            step._reorder()
        outputs = step_together(self._span, [(step._cache, step._request) for step in steps])
        return [step._on_the_wire(own) for step, own in zip(steps, outputs, strict=True)]

    @property
    def _kind(self) -> tuple[int, int, int, bool]:
        """Equal in steps that can be one batch."""
        return self._request.start, self._request.end, self._request.hidden.shape[1], self._is_beyond

    def _bytes_moved(self, steps: Sequence[SessionStep]) -> float:
        """What a batch of steps reads and writes in memory, which is what its time goes with."""
        if not steps:
            return 0.0
        length = max(
            step._cache.prefix_length + step._request.position + step._request.hidden.shape[1] for step in steps
        )
        stacked = length * sum(step._cache.position_bytes for step in steps)
        weights = self._span.weight_bytes(self._request.start, self._request.end)
        return weights + stacked * (_COPYING if len(steps) > 1 else 1)

    def _reorder(self) -> None:
        hypo_ids, self._hypo_ids = self._hypo_ids, None  # once, also where the step is run again
        if hypo_ids is not None:
            self._cache.reorder(hypo_ids)

    def _on_the_wire(self, outputs: Outputs) -> Outputs:
        return self._span.transfers.outputs_to_wire(outputs, self._request.wire_dtype)


@torch.inference_mode()
def step_together(span: BlockSpan, steps: Sequence[tuple[SessionCache, StepRequest]]) -> list[dict[str, torch.Tensor]]:
    """Runs steps of several open sessions as one batch: of the same blocks, and each of n positions.

    Sessions of different lengths end at the same column, as samples do that are padded on the left.

    Returns:
        What `SessionCache.step` returns for each.
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
    out = span.step(first.start, first.end, hidden, stacked, attention_mask=mask, position_ids=positions)
    return [cache.finish(request, own) for (cache, request), own in zip(steps, out.split(batches), strict=True)]


def verify_joint_steps(span: BlockSpan) -> bool:
    """Whether sessions of different lengths give as one batch what each gives alone, tried on random hidden states.

    False for families whose blocks keep another state than keys and values, or do not take padding on the left.
    """

    def outputs(together: bool) -> torch.Tensor:
        steps, draw = [], torch.Generator().manual_seed(0)
        for batch, length in ((1, 2), (2, 5), (1, 5)):
            hidden = torch.randn(batch, length + 1, span.hidden_size, generator=draw)
            opening = StepRequest(0, span.start, span.end, hidden[:, :length], 0, max_length=length + 1)
            cache = SessionCache(span, opening, num_bytes=0)
            cache.step(span, opening)
            steps.append((cache, StepRequest(0, span.start, span.end, hidden[:, length:], length)))
        found = step_together(span, steps) if together else [cache.step(span, request) for cache, request in steps]
        return torch.cat([own["hidden"] for own in found])

    return same_outputs(span, lambda: outputs(True), lambda: outputs(False))
