"""Forward and backward requests: their fields and tensors, and the checks that need no knowledge of a model.

Shapes: see the legend in `petals_lightning.protocol`; n = end - start is the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol import checks
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.checks import WIRE_DTYPES, typed
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.tensors import DTYPES, INT8_BLOCKWISE

_ANSWER_VALUE_BYTES = 8
"""Memory limit of one value of an answer: 8 bits, its share of a scale, and the float32 that it becomes."""


def answer_bytes(*tensors: torch.Tensor | None) -> int:
    """Memory limit of an answer with as many values as these tensors."""
    return _ANSWER_VALUE_BYTES * sum(tensor.numel() for tensor in tensors if tensor is not None)


def inputs_message(method: Method, request: Any) -> Message:
    """A forward or a step as a message: its `_FIELDS` and `_TENSORS`."""
    return Message(
        method,
        {name: getattr(request, name) for name in request._FIELDS},
        {name: tensor for name in request._TENSORS if (tensor := getattr(request, name)) is not None},
        int8_blockwise=request.wire_dtype == INT8_BLOCKWISE,
        answer_bytes=answer_bytes(request.hidden, request.prefix),
    )


@dataclass
class ForwardRequest:
    """Run blocks [start, end).

    Attributes:
        hidden: [B, S, H].
        prefix: [P, H], or None without prompts.
        adapter: of the blocks, or None. Not sent: the receiver fills in what is registered under `adapter_key`.
        rows: [N] int32 indices into the B·S positions whose outputs to return; None returns all.
        adapter_key: names the adapter on this stream, which `adapter` registered before; None: there is none.
        keep: whether to keep the autograd graph, under this call's id.
        input_grad: whether the backward needs the gradient of `hidden`.
        want_prefix: whether to return the prefix's hidden states, for a server with later blocks.
        want_past: whether to return the prefix's keys and values in the blocks too, under the names of an `Adapter`'s.
        past: with `want_past`, an adapter of the shapes that are expected. Not sent.
        wire_dtype: of the tensors in the reply; int8_blockwise also of `hidden`.

    Reply: `hidden` [B, S, H] or [N, H]; `prefix` [P, H] and `past.…` if requested; fields `kept`, `compute` and `queue`
    (seconds).
    """

    start: int
    end: int
    hidden: torch.Tensor
    prefix: torch.Tensor | None = None
    adapter: Adapter | None = None
    rows: torch.Tensor | None = None
    adapter_key: int | None = None
    keep: bool = False
    input_grad: bool = False
    want_prefix: bool = False
    wire_dtype: str = "float32"
    want_past: bool = False
    past: Adapter | None = None

    _FIELDS = ("start", "end", "adapter_key", "keep", "input_grad", "want_prefix", "want_past", "wire_dtype")
    _TENSORS = ("hidden", "prefix", "rows")

    def to_message(self) -> Message:
        message = inputs_message(Method.FORWARD, self)
        if self.past is not None:
            message.answer_bytes += answer_bytes(*self.past.tensors().values())
        return message

    @property
    def grads_bytes(self) -> int:
        """Memory limit of the answer to its backward."""
        adapter = self.adapter.tensors().values() if self.adapter is not None else ()
        return answer_bytes(self.hidden, self.prefix, *adapter)

    @classmethod
    def from_message(cls, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ForwardRequest:
        """Reads a request. Raises ProtocolError if a field is missing or has the wrong type, or shapes do not fit."""
        start, end, wire_dtype = checks.span_and_dtype(fields)
        hidden = checks.hidden(tensors, cls._TENSORS)
        prefix = checks.prefix(tensors, hidden)
        rows = tensors.get("rows")
        if rows is not None:
            if rows.dtype != torch.int32 or rows.ndim != 1 or not len(rows):
                raise ProtocolError("rows must be a non-empty list of int32")
            if len(rows) > hidden.shape[0] * hidden.shape[1]:
                raise ProtocolError(f"{len(rows)} rows of {hidden.shape[0]} × {hidden.shape[1]} positions")
            if rows.min() < 0 or rows.max() >= hidden.shape[0] * hidden.shape[1]:
                raise ProtocolError(f"rows point outside of {hidden.shape[0]} × {hidden.shape[1]} positions")
        want_past = typed({"want_past": False, **fields}, "want_past", bool)
        if want_past and prefix is None:
            raise ProtocolError("keys and values of a prefix are wanted, and there is none")
        return cls(
            start, end, hidden, prefix, None, rows, typed(fields, "adapter_key", (int, type(None))),
            typed(fields, "keep", bool), typed(fields, "input_grad", bool), typed(fields, "want_prefix", bool),
            wire_dtype, want_past,
        )  # fmt: skip


@dataclass
class BackwardRequest:
    """Gradients of a forward.

    Attributes:
        grad: in the shape of `hidden` in the forward's reply.
        grad_prefix: [P, H], or None if no later block read the prefix.
        graph: id of the forward call on this stream whose graph is kept; None: run `forward` again first.
        forward: the request to run again, if `graph` is None.
        wire_dtype: of the gradients in the reply; int8_blockwise also of those in the request.
        answer_bytes: from `grads_bytes`, if the request names a `graph`; not sent.

    Reply: gradients of `prefix` and the adapter's tensors, by their names, if the forward had them, and of `hidden` if
    it had `input_grad`. Those of prefix and adapter are summed over the batch.
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
        """Reads a request. Raises ProtocolError as `ForwardRequest.from_message`."""
        tensors = dict(tensors)
        graph = typed(fields, "graph", (int, type(None)))
        wire_dtype = typed(fields, "wire_dtype", str)
        if wire_dtype not in WIRE_DTYPES:
            raise ProtocolError(f"wire_dtype {wire_dtype!r:.40} is not one of {sorted(WIRE_DTYPES)}")
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


def to_wire(tensor: torch.Tensor, wire_dtype: str, *, shared: bool = False) -> torch.Tensor:
    """Converts a tensor for a message: to the CPU, in `message_dtype`."""
    return tensor.detach().to(device="cpu", dtype=message_dtype(wire_dtype, shared=shared))


def message_dtype(wire_dtype: str, *, shared: bool = False) -> torch.dtype:
    """The dtype of tensors in messages, on both ends.

    Args:
        wire_dtype: of the request.
        shared: whether the tensors are the prefix's hidden states or an adapter's. These are not quantised: their error
            is the same for all samples, so it does not average out.
    """
    if wire_dtype == INT8_BLOCKWISE:
        return torch.bfloat16 if shared else torch.float32
    return DTYPES[wire_dtype]
