"""Our stream method: what client and server say on one long-lived bidirectional stream.

A stream carries messages in both directions, many at once. A message is a header (msgpack) and a body (the bytes of
its tensors), cut into frames so that a short message never waits behind a long one:

    frame   := kind u8 · call id u64 · header length u32 · chunk length u32 · header · chunk
    HEAD    := first frame of a message: its header, and the first chunk of its body
    MORE    := further chunks of the body

The client numbers its calls from 1; the server's reply carries the call's number. A `ping` is answered with where the
client's open calls stand: `calls`, a list of [call id, requests that will run before it]; 0 means that it runs or is
done. A long queue is no hang, an unanswered ping is. `forward` with `keep` leaves its autograd graph on the server
under the call's number; `backward` names it and sends gradients only. `step` runs new positions behind those whose keys
and values the server keeps under a session's number, until `end_session`. `prompts` registers deep prompts for later
requests. Graphs, registered prompts and sessions belong to their stream and are freed when it ends.

Servers open such streams to each other for `handover` (see `handover`), which is answered as soon as it is taken.

Shapes: B batch, S tokens, P virtual tokens, H hidden size, n blocks of the span, N rows that are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import msgpack
import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.tensors import pack_tensors

STREAM_METHOD = "petals_lightning.stream.v1"
CHUNK_BYTES = 1 << 18  # small enough that on a slow link a heartbeat does not wait seconds behind one
MAX_HEADER_BYTES = 1 << 16
FRAME_PREFIX = struct.Struct("!BQII")


class FrameKind(IntEnum):
    HEAD = 1
    MORE = 2


class Method(StrEnum):
    INFO = "info"
    PING = "ping"
    AUTH = "auth"
    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"
    END_SESSION = "end_session"
    PROMPTS = "prompts"
    HANDOVER = "handover"
    CANCEL = "cancel"
    OK = "ok"
    ERROR = "error"


class ErrorCode(StrEnum):
    """Why a server did not do what it was asked.

    All are answered by sending the request again: elsewhere (NOT_SERVED, OVERLOADED, LEAVING, NOT_ALLOWED; BAD_REQUEST
    and INTERNAL, which may be the fault of either side), here with more (GRAPH_LOST, PROMPTS_LOST, CACHE_LOST), or
    without a route (NOT_HANDED_OVER: the next server cannot be reached from here).
    """

    BAD_REQUEST = "bad_request"
    INTERNAL = "internal"
    NOT_SERVED = "not_served"
    OVERLOADED = "overloaded"
    LEAVING = "leaving"
    NOT_ALLOWED = "not_allowed"
    GRAPH_LOST = "graph_lost"
    PROMPTS_LOST = "prompts_lost"
    CACHE_LOST = "cache_lost"
    NOT_HANDED_OVER = "not_handed_over"


@dataclass
class Message:
    """One message: `method`, small `fields` (msgpack types) and named `tensors`.

    Attributes:
        int8_blockwise: its float32 tensors are to travel in 8 bits.
        dropped: why its reader had no room for the tensors and let them pass; only method and fields are there then.
        reserved: bytes of memory that its reader took for it; 0 where none was.
        answer_bytes: of a request, the most memory that its answer may take; not sent.
    """

    method: Method
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    int8_blockwise: bool = False
    dropped: str = ""
    reserved: int = 0
    answer_bytes: int = 0

    @classmethod
    def error(cls, code: ErrorCode, message: str) -> Message:
        """The answer to a request that was refused or failed."""
        return cls(Method.ERROR, {"code": code.value, "message": message})

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_elements(self) -> int:
        """Of its tensors, in whatever dtype they travel."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def frames(self, call_id: int) -> Iterator[list[bytes | memoryview]]:
        """The message as frames, each a list of buffers to write in order."""
        description, buffers = pack_tensors(self.tensors, int8_blockwise=self.int8_blockwise)
        header = msgpack.packb({"m": self.method.value, "f": self.fields, "t": description})
        kind, pieces, size = FrameKind.HEAD, [], 0
        for buffer in buffers:
            while len(buffer):
                piece, buffer = buffer[: CHUNK_BYTES - size], buffer[CHUNK_BYTES - size :]
                pieces.append(piece)
                size += len(piece)
                if size == CHUNK_BYTES:
                    yield [FRAME_PREFIX.pack(kind, call_id, len(header), size), header, *pieces]
                    kind, header, pieces, size = FrameKind.MORE, b"", [], 0
        if size or kind is FrameKind.HEAD:
            yield [FRAME_PREFIX.pack(kind, call_id, len(header), size), header, *pieces]


def parse_header(data: bytes) -> tuple[Method, dict[str, Any], list[Any]]:
    """Method, fields and tensor description of a header.

    Raises:
        ProtocolError: the bytes are not such a header.
    """
    try:
        header = msgpack.unpackb(data, raw=False)
        method, fields, description = Method(header["m"]), header["f"], header["t"]
    except Exception as e:  # msgpack documents no common base for what malformed input can raise
        raise ProtocolError(f"malformed header: {type(e).__name__}") from e
    if not isinstance(fields, dict):
        raise ProtocolError("malformed header: fields are no map")
    return method, fields, description
