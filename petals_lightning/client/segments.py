"""The parts of a step on its way through servers: data only.

A route is a list of segments. A segment is one server, or several consecutive servers that hand a request over to each
other, so that it is sent once and answered once. Each server's part of a segment is a leg.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, L blocks, N positions that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.protocol.adapters import Adapter


@dataclass
class MicroBatch:
    """The inputs of block `start`: hidden [B, S, H], prefix [P, H] or None, and rows [N] to read or None for all.

    `adapter`: of all blocks that the step runs, the same for all its micro-batches.
    `input_grad`: a gradient of hidden is needed. `keep`: a backward will follow.
    `past`: collects the prefix's keys and values in the blocks that run, from their servers; None: they are not wanted.
    """

    start: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None
    adapter: Adapter | None
    input_grad: bool
    keep: bool
    past: Adapter | None = None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]

    def adapter_of(self, start: int, end: int) -> Adapter | None:
        """What is added to blocks [start, end); None if nothing is."""
        adapter = self.adapter.between(start, end) if self.adapter is not None else None
        return adapter if adapter is not None and not adapter.is_empty else None


@dataclass
class Leg:
    """Blocks [start, end) of one micro-batch on one server.

    Attributes:
        peer: the server.
        connection: None before the first request.
        graph: the call whose graph the server keeps, as far as the client knows.
        clock: runs while the server works on the request under way.
    """

    start: int
    end: int
    peer: str
    connection: ServerConnection | None = None
    graph: int | None = None
    clock: ServiceTimer = field(default_factory=ServiceTimer)


@dataclass
class Segment:
    """Consecutive legs that answer as one request, and the inputs to run them again.

    Attributes:
        legs: at least one, in the order of blocks.
        hidden, prefix: [B, S, H] and [P, H] that enter the first leg.
        rows: [N] that are read after the last leg; None: all.
    """

    legs: list[Leg]
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None

    @property
    def start(self) -> int:
        return self.legs[0].start

    @property
    def end(self) -> int:
        return self.legs[-1].end

    @property
    def peers(self) -> list[str]:
        return [leg.peer for leg in self.legs]

    @property
    def is_handed_over(self) -> bool:
        return len(self.legs) > 1

    @property
    def slowest(self) -> Leg:
        """The leg whose server has worked for the longest."""
        return max(self.legs, key=lambda leg: leg.clock.lost)


@dataclass
class ForwardResult:
    """Output of a micro-batch: hidden [B, S, H] or [N, H], prefix [P, H] or None, and the segments that computed it."""

    hidden: torch.Tensor
    prefix: torch.Tensor | None
    segments: list[Segment]


@dataclass
class InputGrads:
    """Gradients of a micro-batch: of hidden [B, S, H], prefix [P, H] and the adapter's tensors, or None."""

    hidden: torch.Tensor | None
    prefix: torch.Tensor | None
    adapter: Adapter | None
