"""Tensors as bytes: a small description in the message's header, raw little-endian data in its body."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from petals_lightning.errors import ProtocolError

assert sys.byteorder == "little", "the wire format is little-endian and is not swapped on this machine"

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMS = 5


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[list[list[Any]], list[memoryview]]:
    """Describes tensors and gives their bytes, without a copy where they are contiguous and on the CPU.

    Returns:
        The description for the header, one `[name, dtype, shape]` per tensor, and one memoryview per tensor. The
        views share memory with the tensors: they must not change until the message is sent.
    """
    description, buffers = [], []
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        description.append([name, DTYPE_NAMES[data.dtype], list(data.shape)])
        buffers.append(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return description, buffers


def packed_size(description: Any) -> int:
    """The bytes of body that a description announces; reads nothing of the body.

    Raises:
        ProtocolError: the description is malformed, names a tensor twice or uses an unknown dtype.
    """
    total, names = 0, set()
    if not isinstance(description, list):
        raise ProtocolError(f"tensors must be described by a list, got {type(description).__name__}")
    for entry in description:
        match entry:
            case [str(name), str(dtype), list(shape)] if dtype in DTYPES and name not in names:
                names.add(name)
            case _:
                raise ProtocolError(f"malformed description of a tensor: {entry!r:.100}")
        if (
            len(shape) > MAX_DIMS
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(max(n, 1) for n in shape) > 2**40  # strides overflow even where another dimension is 0
        ):
            raise ProtocolError(f"impossible shape of tensor {name!r:.40}: {shape!r:.100}")
        total += math.prod(shape) * DTYPES[dtype].itemsize
    return total


def unpack_tensors(description: list[list[Any]], body: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a message; they share memory with `body`. `packed_size` must have accepted `description`.

    Raises:
        ProtocolError: `body` has another length than the description announces.
    """
    if packed_size(description) != len(body):
        raise ProtocolError(f"a body of {len(body)} bytes came with tensors of {packed_size(description)} bytes")
    tensors, offset = {}, 0
    for name, dtype_name, shape in description:
        dtype, count = DTYPES[dtype_name], math.prod(shape)
        if count:
            tensors[name] = torch.frombuffer(body, dtype=dtype, count=count, offset=offset).reshape(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
        offset += count * dtype.itemsize
    return tensors
