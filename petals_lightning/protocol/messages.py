"""Our stream method: the messages of client and server on one long-lived bidirectional stream.

A stream carries many messages at once, in both directions. A message is a header (msgpack) and a body (the bytes of
its tensors), cut into frames so that a short message never waits behind a long one:

    frame   := kind u8 · call id u64 · header length u32 · chunk length u32 · header · chunk
    HEAD    := first frame of a message: its header, and the first chunk of its body
    MORE    := further chunks of the body

The client numbers its calls from 1; the server's reply carries the call's number. The answer to a `ping` tells the
queue positions of the client's open calls: `calls`, a list of [call id, requests that will run before it]; 0 means that
the call is running or done. So a client can tell a long queue from a server that hangs and answers no ping.

`forward` with `keep` keeps its autograd graph on the server under the call's number; `backward` names that number and
sends only gradients. `step` runs new positions of a session, whose keys and values the server keeps under a number
until `end_session`. `adapter` registers deep prompts and LoRA factors for later requests. Graphs, registered adapters
and sessions belong to their stream, and are freed when it ends.

Servers open such streams to each other for `handover` (see the module of that name), which is answered as soon as the
request is accepted.
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
from petals_lightning.protocol.records import STREAM_VERSION
from petals_lightning.protocol.tensors import pack_tensors

STREAM_METHOD = f"petals_lightning.stream.v{STREAM_VERSION}"
CHUNK_BYTES = 1 << 18  # small, so that a heartbeat on a slow link does not wait seconds for one
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
    ADAPTER = "adapter"
    HANDOVER = "handover"
    CANCEL = "cancel"
    OK = "ok"
    ERROR = "error"


class ErrorCode(StrEnum):
    """Why a server did not run a request.

    The client always sends the request again: to another server (NOT_SERVED, OVERLOADED, LEAVING, NOT_ALLOWED; also
    BAD_REQUEST and INTERNAL, which may be either side's fault), to the same server with the missing data (GRAPH_LOST,
    ADAPTER_LOST, CACHE_LOST), or without a route (NOT_HANDED_OVER: this server cannot reach the next one).
    """

    BAD_REQUEST = "bad_request"
    INTERNAL = "internal"
    NOT_SERVED = "not_served"
    OVERLOADED = "overloaded"
    LEAVING = "leaving"
    NOT_ALLOWED = "not_allowed"
    GRAPH_LOST = "graph_lost"
    ADAPTER_LOST = "adapter_lost"
    CACHE_LOST = "cache_lost"
    NOT_HANDED_OVER = "not_handed_over"


@dataclass
class Message:
    """One message: `method`, small `fields` (msgpack types) and named `tensors`.

    Attributes:
        int8_blockwise: send float32 tensors in 8 bits.
        dropped: the reason why its reader had no memory for the tensors and dropped them; empty if they are there.
        reserved: bytes of memory that its reader has taken for it.
        answer_bytes: of a request, the limit of its answer's memory; not sent.
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
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def frames(self, call_id: int) -> Iterator[list[bytes | memoryview]]:
        """Cuts the message into frames, each a list of buffers to write in order."""
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
        ProtocolError: the bytes are not a valid header.
    """
    try:
        header = msgpack.unpackb(data, raw=False)
        method, fields, description = Method(header["m"]), header["f"], header["t"]
    except Exception as e:  # msgpack documents no common base class for errors of malformed input
        raise ProtocolError(f"malformed header: {type(e).__name__}") from e
    if not isinstance(fields, dict):
        raise ProtocolError("malformed header: fields are not a map")
    return method, fields, description
