"""Adapters: tensors of a client that act inside blocks.

Deep prompts, LoRA factors and a trained prefix's keys and values have one life. The client makes them, and registers
them with each server of a route, once per version. The server keeps them on the client's stream, at the client's
expense. Requests name them by a key. They are leaves of the server's autograd graph, so their gradients come home with
the backward, summed over the batch.

An adapter that is active acts too, but is not trained. Servers may hold it, and are then sent only its name.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of an adapter's blocks, m the number of those in
which a linear has LoRA or keys and values have one shape, r the rank, K and O the linear's inputs and outputs, h heads,
D and E the sizes of a key and a value.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
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
class PastKeyValues:
    """Keys and values of P positions before every sample, for several blocks: what a cache would hold of them.

    Attributes:
        blocks: numbers of the m blocks, in order.
        keys: [m, h, P, D], after rotary embeddings.
        values: [m, h, P, E].
    """

    blocks: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def grouped(cls, of_block: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[PastKeyValues, ...]:
        """Keys [h, P, D] and values [h, P, E] by block, as one of these for each pair of shapes, in order of shapes."""
        groups: dict[Any, list[int]] = {}
        for block, pair in sorted(of_block.items()):
            groups.setdefault(tuple(tuple(tensor.shape) for tensor in pair), []).append(block)
        return tuple(
            cls(tuple(blocks), *(torch.stack([of_block[block][which] for block in blocks]) for which in (0, 1)))
            for _, blocks in sorted(groups.items())
        )

    def between(self, start: int, end: int) -> PastKeyValues:
        """Those of blocks in [start, end), as views."""
        own = slice(bisect_left(self.blocks, start), bisect_left(self.blocks, end))
        return PastKeyValues(self.blocks[own], self.keys[own], self.values[own])


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a client adds to blocks [start, end).

    Attributes:
        deep: [n, P, H] deep prompts, added to the prefix's hidden states before each block; or None. (Petals' clients
            add them to the first P positions of each sample, and may give [n, B, P, H].)
        lora: for some linears of the blocks.
        version: changes when the values do.
        past: the prefix's keys and values in every block, in place of a prefix that is run; empty: there are none.
        active: an adapter that acts too, without gradients; or None.
        name: under which servers may hold this one; None: it is the client's own, or was sent by it.
        fingerprint: of the named adapter's values (`hf.adapter_files`); None: they are not known here, so `lora` is
            empty.
    """

    start: int
    end: int
    deep: torch.Tensor | None = None
    lora: tuple[LoraFactors, ...] = ()
    version: int = 0
    past: tuple[PastKeyValues, ...] = ()
    active: Adapter | None = None
    name: str | None = None
    fingerprint: str | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; their gradients have the same names in answers. Empty if the blocks have none."""
        named = {"deep": self.deep} if self.deep is not None else {}
        for number, factors in enumerate(self.lora):
            named |= {f"lora.{number}.a": factors.a, f"lora.{number}.b": factors.b}
        for number, past in enumerate(self.past):
            named |= {f"past.{number}.keys": past.keys, f"past.{number}.values": past.values}
        return named

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """`tensors`, and those of an active adapter that is not named: what a client sends, and a server keeps."""
        active = self.active.tensors() if self.active is not None and self.active.name is None else {}
        return self.tensors() | {f"active.{name}": tensor for name, tensor in active.items()}

    @property
    def all_lora(self) -> tuple[LoraFactors, ...]:
        """All factors that act: those of an active adapter, and its own."""
        return (self.active.lora if self.active is not None else ()) + self.lora

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
            past=tuple(
                PastKeyValues(
                    past.blocks,
                    tensors.get(f"past.{number}.keys", past.keys),
                    tensors.get(f"past.{number}.values", past.values),
                )
                for number, past in enumerate(self.past)
            ),
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
        """The same adapter with each of `all_tensors` changed."""
        changed = self.with_tensors({name: change(tensor) for name, tensor in self.tensors().items()})
        if self.active is None or self.active.name is not None:
            return changed
        return replace(changed, active=self.active.map(change))

    def between(self, start: int, end: int) -> Adapter:
        """What is added to blocks [start, end), as views of these tensors."""
        parts = [factors.between(start, end) for factors in self.lora]
        deep = self.deep[start - self.start : end - self.start] if self.deep is not None else None
        past = tuple(part for each in self.past if (part := each.between(start, end)).blocks)
        active = self.active.between(start, end) if self.active is not None else None
        return replace(
            self,
            start=start,
            end=end,
            deep=deep,
            lora=tuple(part for part in parts if part.blocks),
            past=past,
            active=active if active is not None and (active.lora or active.fingerprint is None) else None,
        )

    @property
    def past_length(self) -> int:
        """Positions of the prefix whose keys and values these are, P; 0 if there are none."""
        return self.past[0].keys.shape[2] if self.past else 0

    def as_sent(self, held: Mapping[str, Any]) -> Adapter:
        """What a server is sent: of an active adapter that it holds the name, of any other the tensors.

        Args:
            held: fingerprints of the server's adapters, by name.

        Raises:
            ProtocolError: the server does not hold the active adapter, and its tensors are not here.
        """
        if (active := self.active) is None:
            return self
        if active.name in held and active.fingerprint in (None, held.get(str(active.name))):
            return replace(self, active=Adapter(self.start, self.end, name=active.name))
        if active.fingerprint is None:
            raise ProtocolError(f"it does not hold the adapter {active.name!r}")
        return replace(self, active=replace(active, name=None, fingerprint=None))

    @property
    def is_empty(self) -> bool:
        """Whether nothing acts."""
        return not self.tensors() and self.active is None

    @property
    def lora_only(self) -> Adapter:
        """Its part that acts on all positions: always the same object, so that passes with it may be one batch."""
        is_all = self.deep is None and not self.past
        return self if is_all else self._only_lora  # caching itself, it would be a reference cycle

    @cached_property
    def _only_lora(self) -> Adapter:
        return replace(self, deep=None, past=())

    def copy_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrites the tensors' values, by name."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    @property
    def num_bytes(self) -> int:
        """Of `all_tensors`."""
        return sum(tensor.nbytes for tensor in self.all_tensors().values())

    def is_same(self, other: Adapter | None) -> bool:
        """Whether the other one has the same effect: equal blocks, targets and values."""
        if other is self:
            return True
        if other is None or (self.start, self.end, self.name) != (other.start, other.end, other.name):
            return False
        is_same_active = other.active is None if self.active is None else self.active.is_same(other.active)
        if not is_same_active or self._layout != other._layout:
            return False
        own, others = self.tensors(), other.tensors()
        return own.keys() == others.keys() and all(is_same(tensor, others[name]) for name, tensor in own.items())

    @property
    def _layout(self) -> dict[str, list[Any]]:
        """Target and blocks of each of `lora`, and blocks of each of `past`, if there are any."""
        lora = [[factors.target, list(factors.blocks)] for factors in self.lora]
        past = [list(past.blocks) for past in self.past]
        return {name: each for name, each in (("lora", lora), ("past", past)) if each}

    def check_fits(self, start: int, end: int, prefix: torch.Tensor | None) -> None:
        """Raises ProtocolError unless a request for blocks [start, end) with this prefix can use it."""
        if (self.start, self.end) != (start, end):
            raise ProtocolError(f"an adapter of blocks {self.start}:{self.end} does not fit blocks {start}:{end}")
        if self.deep is not None and prefix is None:
            raise ProtocolError("deep prompts need a prefix")
        if self.deep is not None and prefix is not None and self.deep.shape[1:] != prefix.shape:
            raise ProtocolError(f"deep prompts {list(self.deep.shape)} do not fit a prefix {list(prefix.shape)}")
        if self.past and prefix is not None:
            raise ProtocolError("a prefix is given twice: as hidden states, and as keys and values")

    def to_message(self, key: int) -> Message:
        """The message that registers it under a key."""
        fields: dict[str, Any] = {"key": key, "span": [self.start, self.end], **self._layout}
        if self.active is not None:
            fields["active"] = self.active.name if self.active.name is not None else self.active._layout["lora"]
        return Message(Method.ADAPTER, fields, self.all_tensors())

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
        active = None
        if isinstance(given := fields.get("active"), str):
            active = cls(start, end, name=given)
        elif given is not None:
            active = cls(start, end, lora=_factors(typed(fields, "active", list), tensors, "active.", start, end))
        lora = _factors(typed({"lora": [], **fields}, "lora", list), tensors, "", start, end)
        past = _checked_past(typed({"past": [], **fields}, "past", list), tensors, start, end)
        adapter = cls(start, end, deep, lora, past=past, active=active)
        if adapter.past and adapter.deep is not None:
            raise ProtocolError("an adapter has deep prompts, or keys and values, not both")
        if adapter.is_empty or adapter.all_tensors().keys() != tensors.keys():
            raise ProtocolError(f"an adapter's tensors are {sorted(tensors)!r:.100}")
        return key, adapter


def _factors(
    layout: list[Any], tensors: dict[str, torch.Tensor], prefix: str, start: int, end: int
) -> tuple[LoraFactors, ...]:
    """The factors of a message, whose tensors' names begin with `prefix`. Raises ProtocolError."""
    lora = []
    for number, entry in enumerate(layout):
        match entry:
            case [str(target), list(blocks)] if all(type(block) is int for block in blocks):
                a, b = (checks.floating(tensors, f"{prefix}lora.{number}.{name}", 3) for name in "ab")
                lora.append(_checked(target, blocks, a, b, start, end))
            case _:
                raise ProtocolError(f"malformed LoRA: {entry!r:.60}")
    return tuple(lora)


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


def by_block(past: Iterable[PastKeyValues]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys [h, P, D] and values [h, P, E] of each block, in order.

    They are unbound, not indexed: the gradient of an index is as large as the whole tensor, for each block.
    """
    of_block = {
        block: pair
        for each in past
        for block, pair in zip(each.blocks, zip(each.keys.unbind(), each.values.unbind(), strict=True), strict=True)
    }
    return [pair for _, pair in sorted(of_block.items(), key=operator.itemgetter(0))]


def _checked_past(
    layout: list[Any], tensors: dict[str, torch.Tensor], start: int, end: int
) -> tuple[PastKeyValues, ...]:
    """Keys and values of all blocks [start, end). Raises ProtocolError unless every block has them once, for one P."""
    found: list[PastKeyValues] = []
    for number, blocks in enumerate(layout):
        if not isinstance(blocks, list) or not blocks or not all(type(block) is int for block in blocks):
            raise ProtocolError(f"malformed keys and values: {blocks!r:.60}")
        keys, values = (checks.floating(tensors, f"past.{number}.{name}", 4) for name in ("keys", "values"))
        if keys is None or values is None:
            raise ProtocolError("keys or values are missing")
        if len(keys) != len(blocks) or keys.shape[:3] != values.shape[:3] or 0 in (*keys.shape, *values.shape):
            raise ProtocolError(
                f"keys {list(keys.shape)} and values {list(values.shape)} do not fit {len(blocks)} blocks"
            )
        found.append(PastKeyValues(tuple(blocks), keys, values))
    if found:
        named, lengths = [block for each in found for block in each.blocks], {each.keys.shape[2] for each in found}
        in_order = all(x < y for each in found for x, y in pairwise(each.blocks))
        is_all = len(named) == end - start and sorted(named) == list(range(start, end))
        if not is_all or not in_order or len(lengths) > 1:
            raise ProtocolError(f"keys and values are for blocks {named!r:.60}, must be for {start}:{end}, for one P")
    return tuple(found)


def float_zeros(adapter: Adapter) -> Adapter:
    """An adapter of the same layout for gradients: zeros, in float32."""
    return adapter.map(lambda tensor: torch.zeros(tensor.shape))


def sum_of(adapters: Sequence[Adapter]) -> Adapter:
    """The sum of adapters of one layout, e.g. of the gradients of micro-batches."""
    named = [adapter.tensors() for adapter in adapters]
    return adapters[0].with_tensors({name: reduce(operator.add, [each[name] for each in named]) for name in named[0]})
