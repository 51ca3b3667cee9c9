"""Adapters: tensors of a client that act inside blocks.

Deep prompts and LoRA factors have one life. The client makes them, and registers them with each server of a route, once
per version. The server keeps them on the client's stream, at the client's expense. Requests name them by a key. They
are leaves of the server's autograd graph, so their gradients come home with the backward, summed over the batch.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of an adapter's blocks, m the number of those in
which a linear has LoRA, r the rank, K and O the linear's inputs and outputs.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol import checks
from petals_lightning.protocol.checks import typed
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.tensors import is_same


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """LoRA of a linear x [.., K] → y [.., O] in several blocks: y + (x Aᵀ) Bᵀ. The client has scaled B.

    Attributes:
        target: the linear's path inside a block, e.g. `self_attn.q_proj`.
        blocks: numbers of the m blocks, in order.
        a: [m, r, K].
        b: [m, O, r].
    """

    target: str
    blocks: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor

    def between(self, start: int, end: int) -> LoraFactors:
        """The factors of those blocks that are in [start, end), as views."""
        own = slice(bisect_left(self.blocks, start), bisect_left(self.blocks, end))
        return LoraFactors(self.target, self.blocks[own], self.a[own], self.b[own])


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a client adds to blocks [start, end).

    Attributes:
        deep: [n, P, H] deep prompts, added to the prefix's hidden states before each block; or None. (Petals' clients
            add them to the first P positions of each sample, and may give [n, B, P, H].)
        lora: for some linears of the blocks.
        version: changes when the values do.
    """

    start: int
    end: int
    deep: torch.Tensor | None = None
    lora: tuple[LoraFactors, ...] = ()
    version: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; their gradients have the same names in answers. Empty if the blocks have none."""
        named = {"deep": self.deep} if self.deep is not None else {}
        for number, factors in enumerate(self.lora):
            named |= {f"lora.{number}.a": factors.a, f"lora.{number}.b": factors.b}
        return named

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """The same adapter with other tensors, by name; those that are not given stay."""
        return replace(
            self,
            deep=tensors.get("deep", self.deep),
            lora=tuple(
                LoraFactors(
                    factors.target,
                    factors.blocks,
                    tensors.get(f"lora.{number}.a", factors.a),
                    tensors.get(f"lora.{number}.b", factors.b),
                )
                for number, factors in enumerate(self.lora)
            ),
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
        """The same adapter with each tensor changed."""
        return self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def between(self, start: int, end: int) -> Adapter:
        """What is added to blocks [start, end), as views of these tensors."""
        parts = [factors.between(start, end) for factors in self.lora]
        deep = self.deep[start - self.start : end - self.start] if self.deep is not None else None
        return Adapter(start, end, deep, tuple(part for part in parts if part.blocks), self.version)

    @property
    def lora_only(self) -> Adapter:
        """Its part that acts on all positions: always the same object, so that passes with it may be one batch."""
        return self._without_deep if self.deep is not None else self  # caching itself, it would be a reference cycle

    @cached_property
    def _without_deep(self) -> Adapter:
        return replace(self, deep=None)

    def copy_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the tensors' values, by name."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def is_same(self, other: Adapter | None) -> bool:
        """Whether the other one has the same effect: equal blocks, targets and values."""
        if other is self:
            return True
        if other is None or (self.start, self.end) != (other.start, other.end) or self._layout != other._layout:
            return False
        own, others = self.tensors(), other.tensors()
        return own.keys() == others.keys() and all(is_same(tensor, others[name]) for name, tensor in own.items())

    @property
    def _layout(self) -> list[list[Any]]:
        """Target and blocks of each of `lora`."""
        return [[factors.target, list(factors.blocks)] for factors in self.lora]

    def check_fits(self, start: int, end: int, prefix: torch.Tensor | None) -> None:
        """Raises ProtocolError unless a request for blocks [start, end) with this prefix can use it."""
        if (self.start, self.end) != (start, end):
            raise ProtocolError(f"an adapter of blocks {self.start}:{self.end} does not fit blocks {start}:{end}")
        if self.deep is not None and prefix is None:
            raise ProtocolError("deep prompts need a prefix")
        if self.deep is not None and prefix is not None and self.deep.shape[1:] != prefix.shape:
            raise ProtocolError(f"deep prompts {list(self.deep.shape)} do not fit a prefix {list(prefix.shape)}")

    def to_message(self, key: int) -> Message:
        """The message that registers it under a key."""
        fields = {"key": key, "span": [self.start, self.end]} | ({"lora": self._layout} if self.lora else {})
        return Message(Method.ADAPTER, fields, self.tensors())

    @classmethod
    def from_message(cls, message: Message) -> tuple[int, Adapter]:
        """Key and adapter. Raises ProtocolError if a part is missing, or shapes contradict each other."""
        fields, tensors = message.fields, message.tensors
        key = typed(fields, "key", int)
        match fields.get("span"):
            case [int(start), int(end)] if 0 <= start < end:
                pass
            case other:
                raise ProtocolError(f"the blocks of an adapter are {other!r:.60}")
        deep = checks.floating(tensors, "deep", 3)
        if deep is not None and (len(deep) != end - start or 0 in deep.shape):
            raise ProtocolError(f"deep prompts are {list(deep.shape)} for blocks {start}:{end}")
        lora = []
        for number, entry in enumerate(typed({"lora": [], **fields}, "lora", list)):
            match entry:
                case [str(target), list(blocks)] if all(type(block) is int for block in blocks):
                    a, b = (checks.floating(tensors, f"lora.{number}.{name}", 3) for name in "ab")
                    lora.append(_checked(target, blocks, a, b, start, end))
                case _:
                    raise ProtocolError(f"malformed LoRA: {entry!r:.60}")
        adapter = cls(start, end, deep, tuple(lora))
        if not adapter.tensors() or adapter.tensors().keys() != tensors.keys():
            raise ProtocolError(f"an adapter's tensors are {sorted(tensors)!r:.100}")
        return key, adapter


def _checked(
    target: str, blocks: list[int], a: torch.Tensor | None, b: torch.Tensor | None, start: int, end: int
) -> LoraFactors:
    name = f"LoRA of {target!r:.60}"
    if a is None or b is None:
        raise ProtocolError(f"{name} lacks a factor")
    if not blocks or not (start <= blocks[0] and blocks[-1] < end) or any(x >= y for x, y in pairwise(blocks)):
        raise ProtocolError(f"{name} is for blocks {blocks!r:.60}, must be some of {start}:{end} in order")
    rank = a.shape[1]
    if not len(a) == len(b) == len(blocks) or b.shape[2] != rank:
        raise ProtocolError(f"{name}: factors {list(a.shape)} and {list(b.shape)} do not fit {len(blocks)} blocks")
    if not 1 <= rank <= max(a.shape[2], b.shape[1]):  # PEFT gives a gate with one output the rank of all others
        raise ProtocolError(f"{name} has rank {rank}, must be 1 to {max(a.shape[2], b.shape[1])}")
    return LoraFactors(target, tuple(blocks), a, b)


def float_zeros(adapter: Adapter) -> Adapter:
    """An adapter of the same layout for gradients: zeros, in float32."""
    return adapter.map(lambda tensor: torch.zeros(tensor.shape))


def sum_of(adapters: Sequence[Adapter]) -> Adapter:
    """The sum of adapters of one layout, e.g. of the gradients of micro-batches."""
    named = [adapter.tensors() for adapter in adapters]
    return adapters[0].with_tensors({name: reduce(operator.add, [each[name] for each in named]) for name in named[0]})
