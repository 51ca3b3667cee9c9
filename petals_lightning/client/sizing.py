"""How small to cut a batch, so that servers and links of a chain work at once. Pure: takes times, gives a size.

Micro-batches pass a chain one behind the other. The first one needs the sum of all stages' times, and each of the
others arrives later than the one before by the time of the slowest stage. Smaller ones fill the chain sooner, but each
costs something whatever its size: the way through Python, kernels to launch, the prefix, gradients of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEGLIGIBLE = 0.02  # a smaller gain is not worth more requests, each of which costs its server something


@dataclass(frozen=True)
class Stage:
    """A server or a link.

    Attributes:
        batch_seconds: for all samples of a batch.
        request_seconds: for each micro-batch besides, whatever its size.
    """

    batch_seconds: float
    request_seconds: float


def pipeline_seconds(stages: Sequence[Stage], count: int) -> float:
    """What a batch takes in `count` equal micro-batches."""
    each = [stage.batch_seconds / count + stage.request_seconds for stage in stages]
    return sum(each) + (count - 1) * max(each)


def microbatch_size(batch: int, stages: Sequence[Stage], *, smallest: int, largest: int) -> int:
    """Samples of a micro-batch, from `smallest` to `largest`, with which a batch of so many is through soonest.

    Of sizes that make little difference it is the largest, and all micro-batches are as equal as they go.
    """
    fewest, most = math.ceil(batch / max(largest, 1)), max(batch // max(smallest, 1), 1)
    seconds = {count: pipeline_seconds(stages, count) for count in range(fewest, max(fewest, most) + 1)}
    best = min(seconds.values())
    return math.ceil(batch / next(count for count, each in seconds.items() if each <= best * (1 + NEGLIGIBLE)))
