"""Everything but tensors in a Petals call: metadata, the structure of its arguments, error messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import torch
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import MAX_HEADER_BYTES, ErrorCode

_TUPLE, _DESCRIPTOR = 0x40, 0x51  # hivemind's msgpack extensions
_MAX_DEPTH = 8
_SLOT = b"__T"


def dump(value: Any) -> bytes:
    """Packs a value as msgpack, with hivemind's extensions for tuples and tensor descriptors."""
    return MSGPackSerializer.dumps(value)


def load(data: bytes) -> Any:
    """Unpacks bytes of `dump` from any peer.

    hivemind's own loader recurses as deep as the bytes say: 4 KB of nested tuples overflow the stack.

    Raises:
        ProtocolError: the bytes are too many, nested too deeply, not msgpack, or have unknown extensions.
    """
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(f"metadata of {len(data)} bytes, the limit is {MAX_HEADER_BYTES}")
    try:
        return msgpack.unpackb(data, raw=False, ext_hook=_extension(1))
    except ProtocolError:
        raise
    except Exception as e:  # msgpack documents no common base class for errors of malformed input
        raise ProtocolError(f"malformed metadata: {type(e).__name__}") from e


def load_dict(data: bytes) -> dict[Any, Any]:
    """Unpacks a request's metadata as `load`; no bytes are an empty dict."""
    value = load(data) if data else {}
    if not isinstance(value, dict):
        raise ProtocolError(f"metadata must be a dict, got {type(value).__name__}")
    return value


def _extension(depth: int) -> Callable[[int, bytes], Any]:
    def hook(code: int, data: bytes) -> Any:
        if depth > _MAX_DEPTH:
            raise ProtocolError("malformed metadata: nested too deeply")
        if code == _TUPLE:
            return tuple(msgpack.unpackb(data, raw=False, ext_hook=_extension(depth + 1)))
        if code == _DESCRIPTOR:
            msgpack.unpackb(data, raw=False, ext_hook=_extension(depth + 1))  # else `unpackb` could recurse
            return BatchTensorDescriptor.unpackb(data)
        raise ProtocolError(f"malformed metadata: unknown extension {code}")

    return hook


def pack_arguments(*arguments: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """The distinct tensors, and the structure that maps arguments to them. A repeated object is sent once."""
    tensors: list[torch.Tensor] = []
    slots: dict[int, int] = {}
    for argument in arguments:
        if id(argument) not in slots:
            slots[id(argument)] = len(tensors)
            tensors.append(argument)
    return tensors, (tuple(_SLOT + str(slots[id(argument)]).encode() for argument in arguments), {})


def unpack_arguments(tensors: Sequence[torch.Tensor], structure: Any) -> list[torch.Tensor]:
    """The arguments of a call. Without a structure they are the tensors in order.

    Raises:
        ProtocolError: the structure is malformed, or names tensors that were not sent.
    """
    if structure is None:
        return list(tensors)
    match structure:
        case [[*arguments], dict(named)] if not named:
            return [_in_slot(tensors, slot) for slot in arguments]
    raise ProtocolError(f"args_structure {structure!r:.100} is not a list of tensors without keywords")


def _in_slot(tensors: Sequence[torch.Tensor], slot: Any) -> torch.Tensor:
    if isinstance(slot, bytes) and slot.startswith(_SLOT) and len(slot) <= 8:
        number = slot.removeprefix(_SLOT)
        if number.isdigit() and int(number) < len(tensors):
            return tensors[int(number)]
    raise ProtocolError(f"args_structure names {slot!r:.40}, and {len(tensors)} tensors came with it")


def error_text(code: ErrorCode, message: str) -> str:
    """The text of an error for a Petals client; hivemind sends only text."""
    return f"{code.value}: {message}"


def parse_error(text: str) -> tuple[ErrorCode | None, str]:
    """Code and message of an error text; no code if another kind of server wrote it."""
    for code in ErrorCode:
        _, found, message = text.partition(f"{code.value}: ")
        if found:
            return code, message
    return None, text
