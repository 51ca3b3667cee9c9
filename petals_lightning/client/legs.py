"""What a micro-batch consists of on its way through servers: data only.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, L blocks, N rows that are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from petals_lightning.client.deadlines import ServiceClock
from petals_lightning.client.server_connection import ServerConnection


@dataclass(frozen=True)
class StepPrompts:
    """Deep prompts of a step, the same for all its micro-batches.

    Attributes:
        deep: [L, P, H] on the CPU, for blocks [start, start + L).
        start: the first block they are for.
        version: changes when the values do; servers keep prompts by version.
    """

    deep: torch.Tensor
    start: int
    version: int

    def between(self, start: int, end: int) -> torch.Tensor:
        """Those of blocks [start, end)."""
        return self.deep[start - self.start : end - self.start]


@dataclass
class MicroBatch:
    """What enters block `start`: hidden [B, S, H], prefix [P, H] or None, and rows [N] to read or None for all.

    `input_grad`: hidden needs a gradient; `keep`: a backward will follow; `leads`: it is the first of its batch, so
    none is in front of it on its way.
    """

    start: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None
    prompts: StepPrompts | None
    input_grad: bool
    keep: bool
    leads: bool = False

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass
class Leg:
    """Blocks [start, end) of one micro-batch on one server, with the inputs to run them again."""

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None
    rows: torch.Tensor | None
    peer: str
    connection: ServerConnection | None = None
    graph: int | None = None
    clock: ServiceClock = field(default_factory=ServiceClock)


@dataclass
class ChainResult:
    """Output of a micro-batch: hidden [B, S, H] or [N, H], prefix [P, H] or None, and the legs that led there.

    `handed_over`: only the first leg has its inputs.
    """

    hidden: torch.Tensor
    prefix: torch.Tensor | None
    legs: list[Leg]
    handed_over: bool = False


@dataclass
class ChainGrads:
    """Gradients of a micro-batch: hidden [B, S, H] or None, prefix [P, H] or None, deep [L, P, H] or None."""

    hidden: torch.Tensor | None
    prefix: torch.Tensor | None
    deep: torch.Tensor | None
