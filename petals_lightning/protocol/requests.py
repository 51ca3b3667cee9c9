"""Forward and backward requests: their fields and tensors, and the checks on those that need no knowledge of a model.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, n = end - start blocks, N rows that are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol import checks
from petals_lightning.protocol.checks import WIRE_DTYPES, typed
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.tensors import DTYPES, INT8_BLOCKWISE

_ANSWER_VALUE_BYTES = 8
"""Of memory that a value of an answer takes at most: 8 bits, its share of a scale, and the float32 that it becomes."""


def answer_bytes(*tensors: torch.Tensor | None) -> int:
    """The most memory that an answer may take which is as large as these tensors."""
    return _ANSWER_VALUE_BYTES * sum(tensor.numel() for tensor in tensors if tensor is not None)


def grads_bytes(hidden: torch.Tensor, prefix: torch.Tensor | None, num_blocks: int) -> int:
    """The most memory that gradients of a forward's inputs may take: hidden [B, S, H], prefix [P, H], deep prompts."""
    return answer_bytes(hidden, *[prefix] * (1 + num_blocks))


@dataclass
class ForwardRequest:
    """Run blocks [start, end).

    Attributes:
        hidden: [B, S, H].
        prefix: [P, H], or None without prompts.
        deep: [n, P, H], or None: there are none, or they were sent before under `prompts_key`.
        rows: [N] int32 indices into the B·S positions whose outputs are wanted, None for all.
        prompts_key: names `deep` on this stream: with `deep` it is kept under the key, without it is looked up.
        keep: keep the autograd graph under this call's id.
        input_grad: the backward will want the gradient of `hidden`.
        want_prefix: return the prefix's hidden states (somebody runs blocks behind `end`).
        wire_dtype: of the tensors that come back; int8_blockwise also of `hidden`.

    Reply: `hidden` [B, S, H] or [N, H]; `prefix` [P, H] if wanted; fields `kept`, and `compute` and `queue` in seconds.
    """

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None = None
    deep: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    prompts_key: int | None = None
    keep: bool = False
    input_grad: bool = False
    want_prefix: bool = False
    wire_dtype: str = "float32"

    _FIELDS = ("start", "end", "prompts_key", "keep", "input_grad", "want_prefix", "wire_dtype")
    _TENSORS = ("hidden", "prefix", "deep", "rows")

    def to_message(self) -> Message:
        fields = {name: getattr(self, name) for name in self._FIELDS}
        tensors = {name: t for name in self._TENSORS if (t := getattr(self, name)) is not None}
        return Message(
            Method.FORWARD,
            fields,
            tensors,
            int8_blockwise=self.wire_dtype == INT8_BLOCKWISE,
            answer_bytes=answer_bytes(self.hidden, self.prefix),
        )

    @property
    def grads_bytes(self) -> int:
        """The most memory that the answer to its backward may take."""
        return grads_bytes(self.hidden, self.prefix, self.end - self.start)

    @classmethod
    def from_message(cls, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ForwardRequest:
        """Raises ProtocolError if a field is missing or has the wrong type, or shapes contradict each other."""
        start, end, wire_dtype = checks.span_and_dtype(fields)
        if unknown := set(tensors) - set(cls._TENSORS):
            raise ProtocolError(f"unknown tensors {sorted(unknown)!r:.100}")
        hidden = checks.floating(tensors, "hidden", 3)
        if hidden is None:
            raise ProtocolError("the tensor `hidden` is missing")
        prefix, deep = checks.prompts(tensors, hidden, end - start)
        prompts_key = typed(fields, "prompts_key", (int, type(None)))
        if prompts_key is not None and prefix is None:
            raise ProtocolError("deep prompts need a prefix")
        rows = tensors.get("rows")
        if rows is not None:
            if rows.dtype != torch.int32 or rows.ndim != 1 or not len(rows):
                raise ProtocolError("rows must be a non-empty list of int32")
            if len(rows) > hidden.shape[0] * hidden.shape[1]:
                raise ProtocolError(f"{len(rows)} rows of {hidden.shape[0]} × {hidden.shape[1]} positions")
            if rows.min() < 0 or rows.max() >= hidden.shape[0] * hidden.shape[1]:
                raise ProtocolError(f"rows point outside of {hidden.shape[0]} × {hidden.shape[1]} positions")
        return cls(
            start, end, hidden, prefix, deep, rows, prompts_key,
            typed(fields, "keep", bool), typed(fields, "input_grad", bool), typed(fields, "want_prefix", bool),
            wire_dtype,
        )  # fmt: skip


@dataclass
class BackwardRequest:
    """Gradients of a forward.

    Attributes:
        grad: like the forward's `hidden` reply.
        grad_prefix: [P, H], or None if nothing behind the span read the prefix.
        graph: id of the forward call (same stream) whose graph is kept; None: run `forward` again first.
        forward: the request to run again, if `graph` is None.
        wire_dtype: of the gradients that come back; int8_blockwise also of those that go.
        answer_bytes: from `grads_bytes`, for a client that asks by `graph`; not sent.

    Reply: those of `hidden`, `prefix` and `deep` that the forward had (`hidden` only with `input_grad`); prompts'
    gradients are summed over the batch.
    """

    grad: torch.Tensor
    grad_prefix: torch.Tensor | None = None
    graph: int | None = None
    forward: ForwardRequest | None = None
    wire_dtype: str = "float32"
    answer_bytes: int = 0

    def to_message(self) -> Message:
        fields: dict[str, Any] = {"graph": self.graph, "wire_dtype": self.wire_dtype}
        tensors = {"grad": self.grad}
        if self.grad_prefix is not None:
            tensors["grad_prefix"] = self.grad_prefix
        if self.forward is not None:
            again = self.forward.to_message()
            fields["forward"] = again.fields
            tensors |= again.tensors
        return Message(
            Method.BACKWARD,
            fields,
            tensors,
            int8_blockwise=self.wire_dtype == INT8_BLOCKWISE,
            answer_bytes=self.forward.grads_bytes if self.forward is not None else self.answer_bytes,
        )

    @classmethod
    def from_message(cls, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> BackwardRequest:
        """Raises ProtocolError as `ForwardRequest.from_message`."""
        tensors = dict(tensors)
        graph = typed(fields, "graph", (int, type(None)))
        wire_dtype = typed(fields, "wire_dtype", str)
        if wire_dtype not in WIRE_DTYPES:
            raise ProtocolError(f"wire_dtype {wire_dtype!r:.40} is none of {sorted(WIRE_DTYPES)}")
        grad, grad_prefix = tensors.pop("grad", None), checks.floating(tensors, "grad_prefix", 2)
        tensors.pop("grad_prefix", None)
        if grad is None or not grad.is_floating_point():
            raise ProtocolError("the tensor `grad` is missing")
        forward = None
        if graph is None:
            forward = ForwardRequest.from_message(typed(fields, "forward", dict), tensors)
        elif tensors:
            raise ProtocolError("a backward by graph id takes gradients only")
        return cls(grad, grad_prefix, graph, forward, wire_dtype)


def to_wire(tensor: torch.Tensor, wire_dtype: str, *, prompts: bool = False) -> torch.Tensor:
    """The tensor as a message takes it: on the CPU, in `message_dtype`."""
    return tensor.detach().to(device="cpu", dtype=message_dtype(wire_dtype, prompts=prompts))


def message_dtype(wire_dtype: str, *, prompts: bool = False) -> torch.dtype:
    """Of tensors in messages, on both ends.

    Args:
        wire_dtype: of the request.
        prompts: of hidden states of the prefix, and deep prompts. They are not quantised: their error is the same for
            all samples, so it does not average out.
    """
    if wire_dtype == INT8_BLOCKWISE:
        return torch.bfloat16 if prompts else torch.float32
    return DTYPES[wire_dtype]
