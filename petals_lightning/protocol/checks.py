"""Checks that all requests share: a field or a tensor has the type that the protocol requires."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.tensors import DTYPE_NAMES, INT8_BLOCKWISE

WIRE_DTYPES = {"float32", "float16", "bfloat16", INT8_BLOCKWISE}


def typed(fields: dict[str, Any], name: str, kind: Any) -> Any:
    """Returns field `name`. Raises ProtocolError unless it is of `kind` (a bool is not an int)."""
    value = fields.get(name)
    is_stray_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, kind) or is_stray_bool:
        raise ProtocolError(f"field {name!r} is {value!r:.60}")
    return value


def printable(text: str, limit: int) -> str:
    """A stranger's text made safe to show: one line of at most `limit` characters, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:limit]).split())


def span_and_dtype(fields: dict[str, Any]) -> tuple[int, int, str]:
    """Returns fields `start`, `end` and `wire_dtype`. Raises ProtocolError if the span or the dtype is invalid."""
    start, end = typed(fields, "start", int), typed(fields, "end", int)
    wire_dtype = typed(fields, "wire_dtype", str)
    if not 0 <= start < end:
        raise ProtocolError(f"blocks {start}:{end} are not a span")
    if wire_dtype not in WIRE_DTYPES:
        raise ProtocolError(f"wire_dtype {wire_dtype!r:.40} is not one of {sorted(WIRE_DTYPES)}")
    return start, end, wire_dtype


def floating(tensors: dict[str, torch.Tensor], name: str, dims: int) -> torch.Tensor | None:
    """Returns tensor `name` or None. Raises ProtocolError unless it is floating and has `dims` dimensions."""
    tensor = tensors.get(name)
    if tensor is not None and (not tensor.is_floating_point() or tensor.ndim != dims):
        raise ProtocolError(f"tensor {name!r} is {DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}")
    return tensor


def hidden(tensors: dict[str, torch.Tensor], known: Collection[str]) -> torch.Tensor:
    """Returns tensor `hidden` [B, S, H]. Raises ProtocolError if it is missing, or for tensors that are not known."""
    if unknown := set(tensors) - set(known):
        raise ProtocolError(f"unknown tensors {sorted(unknown)!r:.100}")
    tensor = floating(tensors, "hidden", 3)
    if tensor is None:
        raise ProtocolError("the tensor `hidden` is missing")
    return tensor


def prefix(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor | None:
    """Returns `prefix` [P, H] or None. Raises ProtocolError if it does not fit, or a tensor is empty."""
    tensor = floating(tensors, "prefix", 2)
    if tensor is not None and tensor.shape[1] != hidden.shape[2]:
        raise ProtocolError(f"prefix {list(tensor.shape)} and hidden {list(hidden.shape)} differ in hidden size")
    if min(hidden.shape) < 1 or (tensor is not None and min(tensor.shape) < 1):
        raise ProtocolError("a tensor has an empty dimension")
    return tensor
