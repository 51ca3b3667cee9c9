"""Tensors as bytes: a small description in the message's header, and raw little-endian data in its body."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.quantization import dequantize, quantize, quantized_size

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
INT8_BLOCKWISE = "int8_blockwise"
"""The wire form of float32 tensors that are sent in 8 bits (see `quantization`)."""
_WIRE_FORMS = {*DTYPES, INT8_BLOCKWISE}
MAX_DIMS = 5


def pack_tensors(
    tensors: Mapping[str, torch.Tensor], *, int8_blockwise: bool = False
) -> tuple[list[list[Any]], list[memoryview]]:
    """Describes tensors and returns their bytes. Contiguous tensors on the CPU are not copied.

    Args:
        int8_blockwise: quantise float32 tensors that have at least one dimension.

    Returns:
        The description for the header, one `[name, dtype, shape]` per tensor, and memoryviews of their bytes. The views
        share memory with the tensors, which must not change until the message is sent.
    """
    description, buffers = describe_tensors(tensors, int8_blockwise=int8_blockwise), []
    for (_, form, _), tensor in zip(description, tensors.values(), strict=True):
        data = tensor.detach().cpu().contiguous()
        parts: tuple[torch.Tensor, ...] = quantize(data) if form == INT8_BLOCKWISE else (data,)
        buffers += [memoryview(part.reshape(-1).view(torch.uint8).numpy()) for part in parts]  # type: ignore[arg-type]
    return description, buffers


def describe_tensors(tensors: Mapping[str, torch.Tensor], *, int8_blockwise: bool = False) -> list[list[Any]]:
    """Only the description of `pack_tensors`."""

    def form(tensor: torch.Tensor) -> str:
        is_quantised = int8_blockwise and tensor.dtype == torch.float32 and tensor.ndim > 0
        return INT8_BLOCKWISE if is_quantised else DTYPE_NAMES[tensor.dtype]

    return [[name, form(tensor), list(tensor.shape)] for name, tensor in tensors.items()]


def packed_size(description: Any) -> tuple[int, int]:
    """The bytes that a description announces: of the body, and of memory to unpack it. Needs no body.

    Raises:
        ProtocolError: the description is malformed, names a tensor twice or uses an unknown dtype.
    """
    body, unpacked, names = 0, 0, set()
    if not isinstance(description, list):
        raise ProtocolError(f"tensors must be described by a list, got {type(description).__name__}")
    for entry in description:
        match entry:
            case [str(name), str(dtype), list(shape)] if dtype in _WIRE_FORMS and name not in names:
                names.add(name)
            case _:
                raise ProtocolError(f"malformed description of a tensor: {entry!r:.100}")
        if (
            len(shape) > MAX_DIMS
            or not all(type(n) is int and n >= 0 for n in shape)
            or math.prod(max(n, 1) for n in shape) > 2**40  # strides overflow even if another dimension is 0
        ):
            raise ProtocolError(f"impossible shape of tensor {name!r:.40}: {shape!r:.100}")
        if dtype == INT8_BLOCKWISE:
            if not shape:
                raise ProtocolError(f"tensor {name!r:.40} has no dimension to be quantised along")
            body += quantized_size(shape)
            unpacked += math.prod(shape) * torch.float32.itemsize
        else:
            body += math.prod(shape) * DTYPES[dtype].itemsize
    return body, body + unpacked


def unpack_tensors(description: list[list[Any]], body: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a message. They share memory with `body`, except quantised ones, which become float32.

    `packed_size` must have accepted `description`.

    Raises:
        ProtocolError: `body` does not have the length that the description announces.
    """
    if (announced := packed_size(description)[0]) != len(body):
        raise ProtocolError(f"a body of {len(body)} bytes came with tensors of {announced} bytes")
    tensors, offset = {}, 0
    for name, dtype_name, shape in description:
        if dtype_name == INT8_BLOCKWISE:
            codes, size = _view(body, offset, torch.int8, shape), quantized_size(shape)
            scales = _view(body, offset + codes.nbytes, torch.float32, [(size - codes.nbytes) // 4])
            tensors[name] = dequantize(codes, scales)
            offset += size
        else:
            tensors[name] = _view(body, offset, DTYPES[dtype_name], shape)
            offset += tensors[name].nbytes
    return tensors


def is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both are None, or equal in dtype, shape and values."""
    if one is None or other is None:
        return one is other
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))


def _view(body: bytearray, offset: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=count, offset=offset).reshape(shape)
