"""Forward and backward calls of a Petals server: builds and reads requests and responses.

Shapes: see the legend in `petals_lightning.protocol`; here S includes the prefix; n = end - start is the number of
blocks.

Prompts are per sample, and added to the hidden states: `hidden[:, :P] += prompts[i]` before block i. The prefix is part
of `hidden`. Attention is causal over all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.metadata import dump, load_dict, pack_arguments, unpack_arguments
from petals_lightning.protocol.petals.tensors import (
    NONE,
    TensorJoiner,
    check_compressions,
    pack_tensor,
    split_tensor,
)
from petals_lightning.protocol.tensors import DTYPE_NAMES
from petals_lightning.protocol.uids import chain_uid, parse_chain

MAX_TENSORS = 8
"""Limit of the tensors of one call, which uses up to three."""


@dataclass
class Parts:
    """A request on the wire. Each of its messages carries uid and metadata.

    Attributes:
        uid: names of the blocks.
        tensors: the method's arguments.
        metadata: of msgpack types, without `args_structure`.
        structure: which tensor is which argument; None: they are in order.
    """

    uid: str
    tensors: list[torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    structure: Any = None

    def to_request(self, compressions: Sequence[int] = ()) -> ExpertRequest:
        """The request as one message. `compressions` apply to the first tensors; the others are not compressed."""
        tensors = [pack_tensor(t, c) for t, c in zip(self.tensors, _padded(compressions, self.tensors), strict=True)]
        return ExpertRequest(uid=self.uid, tensors=tensors, metadata=self._packed_metadata())

    def to_stream(self, compressions: Sequence[int] = ()) -> list[ExpertRequest]:
        """The same as messages with one part of a tensor each, for the `_stream` methods."""
        whole = self.to_request(compressions)
        return [
            ExpertRequest(uid=whole.uid, tensors=[part], metadata=whole.metadata)
            for tensor in whole.tensors
            for part in split_tensor(tensor)
        ]

    def _packed_metadata(self) -> bytes:
        return dump(
            {**self.metadata, "args_structure": self.structure} if self.structure is not None else self.metadata
        )


class RequestJoiner:
    """Joins the messages of a request.

    Args:
        max_bytes: of its tensors.
        reserve: see `TensorJoiner`.
    """

    def __init__(self, *, max_bytes: int, reserve: Callable[[int], None] = lambda num_bytes: None):
        self._tensors = TensorJoiner(max_bytes=max_bytes, max_tensors=MAX_TENSORS, reserve=reserve)
        self._first: ExpertRequest | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes reserved so far."""
        return self._tensors.num_bytes

    def add(self, message: ExpertRequest) -> None:
        """Adds a message. Raises ProtocolError if it breaks a limit or the format, or names other blocks."""
        if self._first is None:
            self._first = ExpertRequest(uid=message.uid, metadata=message.metadata)
        elif message.uid != self._first.uid:
            raise ProtocolError("the messages of one request name different blocks")
        self._tensors.add(message.tensors)

    def finish(self) -> Parts:
        """The request. Raises ProtocolError if it is incomplete."""
        if self._first is None:
            raise ProtocolError("a request without a message")
        metadata = load_dict(self._first.metadata)
        structure = metadata.pop("args_structure", None)
        tensors = unpack_arguments(self._tensors.finish(), structure)
        return Parts(self._first.uid, tensors, metadata, structure)


def read_request(message: ExpertRequest, *, max_bytes: int) -> Parts:
    """Reads a request of one message. Raises ProtocolError as `RequestJoiner`."""
    joiner = RequestJoiner(max_bytes=max_bytes)
    joiner.add(message)
    return joiner.finish()


@dataclass
class PetalsInputs:
    """The inputs of every call: hidden states [B, S, H] for blocks [start, end) of the model named `prefix`."""

    prefix: str
    start: int
    end: int
    hidden: torch.Tensor


@dataclass
class PetalsForward(PetalsInputs):
    """Run the blocks.

    Attributes:
        prompts: [n, B or 1, P, H], or None.
        output_compression: of each tensor of the response; None: as in the server's schema.
        points: of the public swarm; ignored here.
        active_adapter: name of an adapter that the server holds, or None.

    Response: hidden [B, S, H].
    """

    prompts: torch.Tensor | None = None
    output_compression: list[int] | None = None
    points: float = 0.0
    active_adapter: str | None = None

    def to_parts(self) -> Parts:
        return _call_parts(self, self.hidden)

    @classmethod
    def from_parts(cls, parts: Parts) -> PetalsForward:
        """Reads a request. Raises ProtocolError if a field has the wrong type, or shapes do not fit."""
        if len(parts.tensors) not in (1, 2):
            raise ProtocolError(f"a forward takes hidden states and prompts, got {len(parts.tensors)} tensors")
        (prefix, start, end), hidden = parse_chain(parts.uid), checked_hidden(parts.tensors[0], "hidden")
        prompts = checked_prompts(parts.tensors[1] if len(parts.tensors) > 1 else None, hidden, end - start)
        return cls(prefix, start, end, hidden, prompts, *_options(parts, 1))


@dataclass
class PetalsBackward(PetalsInputs):
    """Gradients of a forward, which the server runs again.

    Attributes:
        grad: in the shape of the forward's response.
        prompts, output_compression, points, active_adapter: as in `PetalsForward`.

    Response: gradients of hidden [B, S, H], and of prompts [n, B, P, H] (per sample) if there are any.
    """

    grad: torch.Tensor
    prompts: torch.Tensor | None = None
    output_compression: list[int] | None = None
    points: float = 0.0
    active_adapter: str | None = None

    def to_parts(self) -> Parts:
        return _call_parts(self, self.hidden, self.grad)

    @classmethod
    def from_parts(cls, parts: Parts) -> PetalsBackward:
        """Reads a request. Raises ProtocolError as `PetalsForward.from_parts`."""
        if len(parts.tensors) not in (2, 3):
            raise ProtocolError(f"a backward takes inputs, gradients and prompts, got {len(parts.tensors)} tensors")
        prefix, start, end = parse_chain(parts.uid)
        hidden, grad = checked_hidden(parts.tensors[0], "hidden"), checked_hidden(parts.tensors[1], "grad")
        if grad.shape != hidden.shape:
            raise ProtocolError(f"gradients {list(grad.shape)} are not like the inputs {list(hidden.shape)}")
        prompts = checked_prompts(parts.tensors[2] if len(parts.tensors) > 2 else None, hidden, end - start)
        return cls(prefix, start, end, hidden, grad, prompts, *_options(parts, 2))


def to_response(tensors: Sequence[torch.Tensor], compressions: Sequence[int] | None = None) -> ExpertResponse:
    """A response as one message. `compressions` apply to the first tensors; the others are not compressed."""
    padded = _padded(compressions or (), tensors)
    return ExpertResponse(tensors=[pack_tensor(t, c) for t, c in zip(tensors, padded, strict=True)])


def split_response(response: ExpertResponse) -> Iterator[ExpertResponse]:
    """The same as messages with one part of a tensor each, for the `_stream` methods."""
    return (ExpertResponse(tensors=[part]) for tensor in response.tensors for part in split_tensor(tensor))


def read_response(messages: Sequence[ExpertResponse], *, max_bytes: int) -> list[torch.Tensor]:
    """The tensors of a response of one or more messages. Raises ProtocolError as `TensorJoiner`."""
    joiner = TensorJoiner(max_bytes=max_bytes, max_tensors=MAX_TENSORS)
    for message in messages:
        joiner.add(message.tensors)
    return joiner.finish()


def dummy(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The placeholder on the wire for a tensor that is not given."""
    return torch.empty(0, dtype=dtype)


def checked_hidden(tensor: torch.Tensor, name: str, *, may_be_empty: bool = False) -> torch.Tensor:
    """Returns a tensor. Raises ProtocolError unless it is floating [B, S, H] and not empty (S may be 0 if allowed)."""
    is_empty = tensor.ndim == 3 and (
        0 in (tensor.shape[0], tensor.shape[2]) or (not may_be_empty and not tensor.numel())
    )
    if not tensor.is_floating_point() or tensor.ndim != 3 or is_empty:
        raise ProtocolError(f"{name} is {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}, must be floating [B, S, H]")
    return tensor


def checked_prompts(prompts: torch.Tensor | None, hidden: torch.Tensor, num_blocks: int) -> torch.Tensor | None:
    """Returns prompts, or None if they are empty. Raises ProtocolError unless they fit the hidden states."""
    if prompts is None or not prompts.numel():
        return None
    batch, tokens, size = hidden.shape
    if (
        not prompts.is_floating_point()
        or prompts.ndim != 4
        or prompts.shape[0] != num_blocks
        or prompts.shape[1] not in (1, batch)
        or prompts.shape[2] > tokens
        or prompts.shape[3] != size
    ):
        raise ProtocolError(
            f"prompts are {DTYPE_NAMES[prompts.dtype]} {list(prompts.shape)}, must be floating "
            f"[{num_blocks}, {batch} or 1, at most {tokens}, {size}]"
        )
    return prompts


def _call_parts(call: PetalsForward | PetalsBackward, *tensors: torch.Tensor) -> Parts:
    prompts = call.prompts if call.prompts is not None else dummy()
    metadata: dict[str, Any] = {"points": call.points, "active_adapter": call.active_adapter}
    if call.output_compression is not None:
        metadata["output_compression"] = call.output_compression
    return Parts(chain_uid(call.prefix, call.start, call.end), *_structured(metadata, *tensors, prompts))


def _structured(metadata: dict[str, Any], *arguments: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any], Any]:
    tensors, structure = pack_arguments(*arguments)
    return tensors, metadata, structure


def _options(parts: Parts, num_outputs: int) -> tuple[list[int] | None, float, str | None]:
    points, adapter = parts.metadata.get("points", 0.0), parts.metadata.get("active_adapter")
    if isinstance(points, bool) or not isinstance(points, (int, float)):
        raise ProtocolError(f"points are {points!r:.60}, must be a number")
    if not isinstance(adapter, (str, type(None))):
        raise ProtocolError(f"active_adapter is {adapter!r:.60}, must be a name or None")
    return check_compressions(parts.metadata.get("output_compression"), num_outputs), points, adapter or None


def _padded(compressions: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[int]:
    return (list(compressions) + [NONE] * len(tensors))[: len(tensors)]
