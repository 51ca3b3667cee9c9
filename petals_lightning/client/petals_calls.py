"""Calls Petals' methods of one server, and says in our errors what went wrong.

Streams are our own (`swarm.streams`), in hivemind's framing: a marker, a length and a protobuf for each message.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import RPCError
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID

from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import PeerFailure, ProtocolError, RemoteRequestError, SwarmError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.metadata import dump, load_dict, pack_arguments, parse_error
from petals_lightning.protocol.petals.methods import MAX_UNARY_BYTES, method_name
from petals_lightning.protocol.petals.tensors import COMPRESSIONS, NONE, TensorJoiner, pack_tensor, split_tensor
from petals_lightning.swarm.streams import open_stream

EMPTY = torch.empty(0)
"""Stands for prompts that are not given."""
_NO_REORDERING = torch.empty(0, dtype=torch.int64)
_SLACK_BYTES = 1 << 16  # of a message, beside its tensors

# Words in errors of Petals' servers, which carry no code, that another server may not say. None: the server is broken.
_RETRIED: dict[str, ErrorCode | None] = {
    "does not serve": ErrorCode.NOT_SERVED,
    "llocate": ErrorCode.OVERLOADED,  # "Could not allocate", "Cannot allocate KV cache", "AllocationFailed"
    "out of memory": ErrorCode.OVERLOADED,
    "max_batch_size": ErrorCode.OVERLOADED,
    "TimeoutError": ErrorCode.OVERLOADED,
    "CUDA": None,
}


def remote_error(peer: str, text: str) -> SwarmError:
    """What a server's error answer is to us: a failure of the peer, or RemoteRequestError where others would agree."""
    code, words = parse_error(text)
    words = words.strip().rstrip("')\"")[:500]
    if code in (ErrorCode.BAD_REQUEST, ErrorCode.INTERNAL):
        return RemoteRequestError(f"server …{peer[-6:]} says: {words}")
    if code is not None:
        return PeerFailure(peer, words, code.value)
    for known, meaning in _RETRIED.items():
        if known in text:
            return PeerFailure(peer, words, meaning.value if meaning is not None else None)
    if not words:
        return PeerFailure(peer, "failed without a word")
    return RemoteRequestError(f"server …{peer[-6:]} says: {words}")


class PetalsCalls:
    """Args:
    p2p: this process's peer.
    peer: the server's base58 id.
    stats: counts bytes.

    Attributes:
        compression: of tensors that are sent, one of hivemind's.
        max_unary_bytes: of a request's tensors, or of its answer's; more go through a stream.
    """

    def __init__(self, p2p: P2P, peer: str, stats: TransferStats):
        self._p2p, self.peer, self._stats = p2p, peer, stats
        self._running: set[asyncio.Future[Any]] = set()
        self.compression = NONE
        self.max_unary_bytes = MAX_UNARY_BYTES // 2

    async def info(self, uid: str) -> dict[Any, Any]:
        """What the server says of a block and itself. Raises PeerFailure or RemoteRequestError, as all of these."""
        answer = await self._unary("rpc_info", ExpertUID(uid=uid), ExpertInfo)
        with self._checked():
            return load_dict(answer.serialized_info)

    async def run(
        self,
        method: str,
        uid: str,
        arguments: list[torch.Tensor],
        shapes: list[list[int]],
        *,
        on_sent: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """Calls `rpc_forward` or `rpc_backward`.

        Args:
            uid: a chain of blocks.
            arguments: tensors; EMPTY where there are no prompts.
            shapes: of the tensors to come back; others are a PeerFailure.
            on_sent: called when the request is on its way, if that can be told.
        """
        tensors, structure = pack_arguments(*arguments)
        packed = [self._pack(tensor) for tensor in tensors]
        metadata = dump({"points": 0.0, "active_adapter": None, "args_structure": structure})
        reply_bytes = sum(4 * torch.Size(shape).numel() for shape in shapes)
        joiner = TensorJoiner(max_bytes=4 * reply_bytes + _SLACK_BYTES, max_tensors=len(shapes))
        if max(reply_bytes, sum(len(tensor.buffer) for tensor in packed)) <= self.max_unary_bytes:
            request = ExpertRequest(uid=uid, tensors=packed, metadata=metadata)
            answer = await self._unary(method, request, ExpertResponse)
            with self._checked():
                joiner.add(answer.tensors)
        else:
            parts = (
                ExpertRequest(uid=uid, tensors=[part], metadata=metadata)
                for tensor in packed
                for part in split_tensor(tensor)
            )
            async with _Stream(self._p2p, self.peer, f"{method}_stream", self._stats, 4 * reply_bytes) as stream:
                sending = asyncio.ensure_future(stream.send_all(parts, on_sent))
                try:
                    while (answer := await stream.receive()) is not None:
                        with self._checked():
                            joiner.add(answer.tensors)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)  # its errors show in what is received
        with self._checked():
            found = joiner.finish()
            if [list(tensor.shape) for tensor in found] != shapes:
                raise ProtocolError(f"answered {[list(tensor.shape) for tensor in found]}, asked for {shapes}")
        return found

    async def open_inference(self, uid: str, max_length: int) -> InferenceCall:
        """A call of rpc_inference with room for `max_length` positions; the server is asked with the first step."""
        stream = _Stream(self._p2p, self.peer, "rpc_inference", self._stats, 0)
        await stream.open()
        return InferenceCall(self, stream, uid, max_length)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point() or self.compression not in COMPRESSIONS:
            return pack_tensor(tensor)  # servers read whatever a tensor says of itself
        is_compressed = self.compression != NONE and tensor.dtype == torch.bfloat16
        return pack_tensor(tensor.float() if is_compressed else tensor, self.compression)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as e:
            raise PeerFailure(self.peer, f"protocol broken: {e}") from e

    async def _unary(self, method: str, request: Message, answer_type: Any) -> Any:
        self._stats.bytes_sent += request.ByteSize()
        peer_id = PeerID.from_base58(self.peer)
        call = asyncio.ensure_future(
            self._p2p.call_protobuf_handler(peer_id, method_name(method), request, answer_type)
        )
        self._running.add(call)
        call.add_done_callback(self._settle)
        try:
            # Not cancelled with us: where a cancelled call is answered, hivemind's reader of all unary calls ends.
            answer = await asyncio.shield(call)
        except P2PHandlerError as e:
            raise remote_error(self.peer, str(e)) from e
        except (P2PDaemonError, OSError, EOFError) as e:
            raise PeerFailure(self.peer, f"cannot be reached: {str(e)[:200] or type(e).__name__}") from e
        except DecodeError as e:
            raise PeerFailure(self.peer, f"protocol broken: {e}") from e
        self._stats.bytes_received += answer.ByteSize()
        return answer

    def _settle(self, call: asyncio.Future[Any]) -> None:
        self._running.discard(call)
        if not call.cancelled():
            call.exception()  # seen, also where nobody waits any more


class InferenceCall:
    """One session of a group of samples; made by `PetalsCalls.open_inference`."""

    def __init__(self, calls: PetalsCalls, stream: _Stream, uid: str, max_length: int):
        self._calls, self._stream, self._uid = calls, stream, uid
        self._session, self._max_length = str(uuid.uuid4()), max_length
        self._has_answered = False

    async def step(
        self, hidden: torch.Tensor, position: int, *, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs [B, n, H] behind the first `position` positions; returns [B, n, H].

        Raises:
            PeerFailure: the server failed; with code CACHE_LOST it lives, but has ended the session.
            RemoteRequestError: it calls the step wrong.
        """
        calls = self._calls
        tensors, structure = pack_arguments(
            hidden,
            prompts if prompts is not None else EMPTY,
            hypo_ids if hypo_ids is not None else _NO_REORDERING,
        )
        metadata: dict[str, Any] = {
            "session_id": self._session,
            "step_id": str(uuid.uuid4()),
            "start_from_position": position,
            "args_structure": structure,
        }
        if not self._has_answered:
            metadata |= {"max_length": self._max_length, "points": 0.0, "active_adapter": None}
        packed = [calls._pack(tensor) for tensor in tensors]
        request = ExpertRequest(uid=self._uid, tensors=packed, metadata=dump(metadata))
        self._stream.max_bytes = 4 * 4 * hidden.numel()
        await self._stream.send(request)
        try:
            answer = await self._stream.receive()
        except PeerFailure as e:
            if not self._has_answered or e.code is not None:
                raise
            answer = None
        if answer is None:
            if self._has_answered:  # it may have ended the session because nobody used it, or be gone
                await calls.info(self._uid.partition(" ")[0])
                raise PeerFailure(calls.peer, "this session is not held there any more", ErrorCode.CACHE_LOST.value)
            raise PeerFailure(calls.peer, "the stream ended")
        joiner = TensorJoiner(max_bytes=self._stream.max_bytes + _SLACK_BYTES, max_tensors=1)
        with calls._checked():
            joiner.add(answer.tensors)
            found = joiner.finish()
            if len(found) != 1 or found[0].shape != hidden.shape:
                raise ProtocolError(f"answered {[list(tensor.shape) for tensor in found]} to {list(hidden.shape)}")
        self._has_answered = True
        return found[0]

    def close(self) -> None:
        """Ends the session: a server frees its memory when the stream ends."""
        self._stream.close()


class _Stream:
    """A stream of protobufs to a method. `max_bytes`: of tensors in a message that comes back."""

    def __init__(self, p2p: P2P, peer: str, method: str, stats: TransferStats, max_bytes: int):
        self._p2p, self._peer, self._method, self._stats = p2p, peer, method, stats
        self.max_bytes = max_bytes
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Raises PeerFailure."""
        try:
            self._reader, self._writer = await open_stream(self._p2p, self._peer, method_name(self._method))
        except ConnectionError as e:
            raise PeerFailure(self._peer, f"cannot connect: {e}") from e

    async def __aenter__(self) -> _Stream:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    async def send(self, message: Message) -> None:
        """A lost stream shows in what is received."""
        assert self._writer is not None
        self._stats.bytes_sent += message.ByteSize()
        try:
            await P2P.send_protobuf(message, self._writer)
        except (ConnectionError, RuntimeError):  # uvloop raises the latter on a closed transport
            return

    async def send_all(self, messages: Iterator[ExpertRequest], on_sent: Callable[[], None]) -> None:
        for message in messages:
            await self.send(message)
        await self.send(P2P.END_OF_STREAM)
        on_sent()

    async def receive(self) -> ExpertResponse | None:
        """The next message, None at the end of the stream.

        Raises:
            PeerFailure, RemoteRequestError: the server answers with an error, or breaks the format.
        """
        assert self._reader is not None
        try:
            marker = await self._reader.readexactly(1)
            size = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
            if size > self.max_bytes + _SLACK_BYTES:
                raise PeerFailure(self._peer, f"protocol broken: a message of {size} bytes is more than was asked for")
            data = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._stats.bytes_received += size
        try:
            if marker == P2P.ERROR_MARKER:
                raise remote_error(self._peer, RPCError.FromString(data).message)
            return ExpertResponse.FromString(data)
        except DecodeError as e:
            raise PeerFailure(self._peer, f"protocol broken: {e}") from e

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
