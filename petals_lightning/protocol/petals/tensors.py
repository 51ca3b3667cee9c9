"""Tensors as hivemind's protobufs, whole or in parts. Received ones are checked before memory is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.proto import runtime_pb2
from hivemind.utils.streaming import split_for_streaming

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.methods import MAX_PART_BYTES
from petals_lightning.protocol.tensors import DTYPE_NAMES, DTYPES, MAX_DIMS

NONE = runtime_pb2.CompressionType.NONE
FLOAT16 = runtime_pb2.CompressionType.FLOAT16
MEANSTD_16BIT = runtime_pb2.CompressionType.MEANSTD_16BIT
QUANTILE_8BIT = runtime_pb2.CompressionType.QUANTILE_8BIT
UNIFORM_8BIT = runtime_pb2.CompressionType.UNIFORM_8BIT
COMPRESSIONS = {NONE, FLOAT16, MEANSTD_16BIT, QUANTILE_8BIT, UNIFORM_8BIT}
"""All compressions of hivemind except BLOCKWISE_8BIT, which needs bitsandbytes."""

_PIECE_VALUES = 1 << 18
_CODEBOOK_BYTES = 8 + 4 * 256  # of the 8-bit compressions: the number of values, then the values


def pack_tensor(tensor: torch.Tensor, compression: int = NONE) -> runtime_pb2.Tensor:
    """A tensor as a protobuf. bfloat16 takes two bytes per value (by hivemind's default it takes four).

    Only floating tensors that are not empty are compressed.

    Raises:
        ProtocolError: the compression is unknown, or does not support this dtype.
    """
    tensor = tensor.detach().cpu()
    if compression not in COMPRESSIONS:
        raise ProtocolError(f"compression {compression!r:.40} is not supported, choose of {sorted(COMPRESSIONS)}")
    if compression == NONE or not tensor.is_floating_point() or not tensor.numel():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return runtime_pb2.Tensor(buffer=data, size=tensor.shape, dtype=DTYPE_NAMES[tensor.dtype])
    if tensor.dtype == torch.bfloat16:
        raise ProtocolError(f"compression {compression} does not take bfloat16")
    return serialize_torch_tensor(tensor.contiguous(), compression)


def num_values(packed: runtime_pb2.Tensor) -> int:
    """The number of values that a tensor, or the first part of one, announces.

    Raises:
        ProtocolError: shape, dtype or compression are impossible or not supported.
    """
    shape = list(packed.size)
    if packed.dtype not in DTYPES:
        raise ProtocolError(f"tensor of dtype {packed.dtype!r:.40}, must be one of {sorted(DTYPES)}")
    if len(shape) > MAX_DIMS or math.prod(max(n, 1) for n in shape) > 2**40:
        raise ProtocolError(f"impossible shape of a tensor: {shape!r:.100}")
    if packed.compression != NONE:
        if packed.compression not in COMPRESSIONS or not DTYPES[packed.dtype].is_floating_point:
            raise ProtocolError(f"compression {packed.compression} of {packed.dtype} is not supported")
        if packed.dtype == "bfloat16" and packed.compression in (FLOAT16, MEANSTD_16BIT):
            raise ProtocolError(f"compression {packed.compression} does not take bfloat16")
        if not shape:
            raise ProtocolError("a compressed tensor has no dimensions")
    return math.prod(shape)


def packed_bytes(packed: runtime_pb2.Tensor) -> set[int]:
    """The possible lengths of an announced tensor's buffer. Raises ProtocolError as `num_values`."""
    count = num_values(packed)
    match packed.compression:
        case compression if compression == NONE or not count:
            legacy = {4 * count} if packed.dtype == "bfloat16" else set()  # hivemind's default sends float32
            return {DTYPES[packed.dtype].itemsize * count} | legacy
        case compression if compression == FLOAT16:
            return {2 * count}
        case compression if compression == MEANSTD_16BIT:
            return {2 * count + 2 * 4 * (count // packed.size[-1])}
        case _:
            return {_CODEBOOK_BYTES + count}


def unpacked_bytes(packed: runtime_pb2.Tensor) -> int:
    """Bytes of an announced tensor when it is unpacked. Raises ProtocolError as `num_values`."""
    return num_values(packed) * DTYPES[packed.dtype].itemsize


def unpack_tensor(packed: runtime_pb2.Tensor, buffer: bytes | bytearray | None = None) -> torch.Tensor:
    """The tensor of a protobuf, or of a first part and the joined buffer.

    hivemind's own function (1.1.12) checks nothing, and fails on 8-bit tensors with numpy 2.4.

    Raises:
        ProtocolError: as `num_values`, or the buffer does not have an announced length.
    """
    lengths, buffer = packed_bytes(packed), packed.buffer if buffer is None else buffer
    if len(buffer) not in lengths:
        raise ProtocolError(f"a tensor of {len(buffer)} bytes where {sorted(lengths)} are announced")
    shape, dtype, count = list(packed.size), DTYPES[packed.dtype], num_values(packed)
    if not count:
        return torch.empty(shape, dtype=dtype)
    body = buffer if isinstance(buffer, bytearray) else bytearray(buffer)
    if packed.compression == NONE:
        sent = torch.float32 if len(body) != dtype.itemsize * count else dtype
        return torch.frombuffer(body, dtype=sent).to(dtype).reshape(shape)
    if packed.compression == FLOAT16:
        return torch.frombuffer(body, dtype=torch.float16).to(dtype).reshape(shape)
    if packed.compression == MEANSTD_16BIT:  # in place, here and below: peers choose the compression
        values = torch.frombuffer(body, dtype=torch.float16, count=count).float().reshape(shape)
        means, stds = (
            part.reshape(*shape[:-1], 1)
            for part in torch.frombuffer(body, dtype=torch.float32, offset=2 * count).chunk(2)
        )
        return values.mul_(stds).add_(means).to(dtype)
    if int.from_bytes(body[:8], "little") != 256:
        raise ProtocolError("an 8-bit tensor must come with 256 values")
    values = torch.frombuffer(body, dtype=torch.float32, offset=8, count=256).to(dtype)
    out = torch.empty(count, dtype=dtype)
    codes = torch.frombuffer(body, dtype=torch.uint8, offset=_CODEBOOK_BYTES)
    for piece, found in zip(codes.split(_PIECE_VALUES), out.split(_PIECE_VALUES), strict=True):
        torch.index_select(values, 0, piece.int(), out=found)  # indices take four bytes per value
    return out.reshape(shape)


def split_tensor(packed: runtime_pb2.Tensor) -> Iterator[runtime_pb2.Tensor]:
    """The parts of a tensor for a stream, one per message. The first one announces the whole tensor."""
    return split_for_streaming(packed, MAX_PART_BYTES)


class TensorJoiner:
    """Joins the tensors of a call from its messages, in which they are whole or in parts.

    Args:
        max_bytes: limit of the memory that all tensors of the call may announce.
        max_tensors: of the call.
        reserve: called before memory is taken for arrived bytes, with the bytes that they take when unpacked. An error
            that it raises ends the call.
    """

    def __init__(self, *, max_bytes: int, max_tensors: int, reserve: Callable[[int], None] = lambda num_bytes: None):
        self._max_bytes, self._max_tensors, self._reserve = max_bytes, max_tensors, reserve
        self._announced, self._expansion = 0, 0.0
        self._first: runtime_pb2.Tensor | None = None
        self._buffer = bytearray()
        self._tensors: list[torch.Tensor] = []
        self.num_bytes = 0
        """Bytes reserved so far."""

    def add(self, parts: Iterable[runtime_pb2.Tensor]) -> None:
        """Adds parts. Raises ProtocolError if one breaks a limit or the format."""
        for part in parts:
            if part.dtype:
                self._finish()
                most, unpacked = max(packed_bytes(part)), unpacked_bytes(part)
                self._expansion = 1 + unpacked / most if part.compression != NONE and most else 1.0
                self._announced += max(unpacked, most)
                if self._announced > self._max_bytes or len(self._tensors) >= self._max_tensors:
                    raise ProtocolError(
                        f"a call of {self._announced} bytes in {len(self._tensors) + 1} tensors is over this peer's "
                        f"limit of {self._max_bytes} bytes in {self._max_tensors}"
                    )
                self._first = runtime_pb2.Tensor()
                self._first.CopyFrom(part)
                self._first.buffer = b""
            elif self._first is None or not part.buffer:
                raise ProtocolError("a part of a tensor comes without its beginning, or without bytes")
            assert self._first is not None
            num_bytes = int(self._expansion * len(part.buffer))
            self._reserve(num_bytes)
            self.num_bytes += num_bytes
            self._buffer += part.buffer
            if len(self._buffer) > max(packed_bytes(self._first)):
                raise ProtocolError("a tensor has more bytes than it announced")

    def finish(self) -> list[torch.Tensor]:
        """All tensors. Raises ProtocolError if the last one is not complete."""
        self._finish()
        return self._tensors

    def _finish(self) -> None:
        if self._first is not None:
            self._tensors.append(unpack_tensor(self._first, self._buffer))
            self._first, self._buffer = None, bytearray()


def check_compressions(value: Any, count: int) -> list[int] | None:
    """The `output_compression` of a request: one for each of up to `count` tensors, or None.

    Raises:
        ProtocolError: it is not a list of supported compressions.
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= count:
        raise ProtocolError(f"output_compression {value!r:.60} must be a list of up to {count} numbers")
    if not all(type(item) is int and item in COMPRESSIONS for item in value):
        raise ProtocolError(f"output_compression {value!r:.60}: choose of {sorted(COMPRESSIONS)}")
    return list(value)
