"""Protobufs with tensors, checked before they are parsed: two bytes can become an object of eighty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse

from petals_lightning.errors import ProtocolError

M = TypeVar("M", ExpertRequest, ExpertResponse)

_TENSORS, _SIZE = 2, 2  # field numbers: of both messages' tensors, of a tensor's size
_MAX_FIELDS = 64  # of a message or of a tensor
_MAX_SHAPE_BYTES = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class CheckedType(Generic[M]):
    """A message type that checks bytes before it parses them; for hivemind in place of the type itself.

    Raises:
        ProtocolError: the parsed message would take far more memory than its bytes.
        DecodeError: the bytes are not such a message.
    """

    def __init__(self, kind: type[M]):
        self._kind = kind

    def FromString(self, data: bytes) -> M:
        for number, tensor in _fields(memoryview(data)):
            if number == _TENSORS:
                for inner, value in _fields(tensor):
                    if inner == _SIZE and len(value) > _MAX_SHAPE_BYTES:
                        raise ProtocolError(f"a tensor's shape has {len(value)} bytes, the limit is {_MAX_SHAPE_BYTES}")
        return self._kind.FromString(data)


REQUEST, RESPONSE = CheckedType(ExpertRequest), CheckedType(ExpertResponse)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and values of the fields. Only values of type bytes are returned; others are empty."""
    place, count = 0, 0
    while place < len(data):
        if (count := count + 1) > _MAX_FIELDS:
            raise ProtocolError(f"a message or a tensor of more than {_MAX_FIELDS} fields")
        tag, place = _varint(data, place)
        length = {_FIXED64: 8, _FIXED32: 4}.get(tag & 7, 0)
        if tag & 7 == _BYTES:
            length, place = _varint(data, place)
        elif tag & 7 == _VARINT:
            _, place = _varint(data, place)
        elif not length:
            raise DecodeError("a field of an unknown kind")
        if place + length > len(data):
            raise DecodeError("a field is longer than its message")
        yield tag >> 3, data[place : place + length] if tag & 7 == _BYTES else data[:0]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Reads a number; returns it and the index after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte, place = data[place], place + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise DecodeError("a number without an end")
