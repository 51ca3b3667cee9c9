"""Calls of Petals' methods of one server; their errors become ours.

Streams are our own (`swarm.streams`), in hivemind's framing: a marker, a length and a protobuf for each message.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID
from packaging.version import InvalidVersion, Version

from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import PeerFailure, ProtocolError
from petals_lightning.protocol.messages import MAX_HEADER_BYTES, ErrorCode
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.protocol.petals.info import ServerInfo
from petals_lightning.protocol.petals.metadata import parse_error
from petals_lightning.protocol.petals.methods import MAX_UNARY_BYTES, method_name
from petals_lightning.protocol.petals.steps import PetalsStep
from petals_lightning.protocol.petals.tensors import NONE
from petals_lightning.protocol.petals.wire import RESPONSE
from petals_lightning.protocol.uids import block_uid
from petals_lightning.swarm.streams import open_stream

MAX_BATCH_TOKENS = 1024
"""B·(P + S) of one request, the limit of Petals' own client; servers usually refuse more than 2,048."""

R = TypeVar("R", bound=PetalsForward | PetalsBackward | PetalsStep)

_BYTES_A_VALUE = 8  # the most per value of an answer, whatever dtype and compression the server chooses

# Parts of the error messages of Petals' own servers, which carry no code, and what they mean: another server may be
# able to do it; or, with None, this server is broken.
_RETRIED: dict[str, ErrorCode | None] = {
    "does not serve": ErrorCode.NOT_SERVED,
    "llocat": ErrorCode.OVERLOADED,  # "Could not allocate …", "Cannot allocate KV cache …", AllocationFailed
    "out of memory": ErrorCode.OVERLOADED,
    "max_batch_size": ErrorCode.OVERLOADED,
    "TimeoutError": ErrorCode.OVERLOADED,
    "CUDA": None,
}


def rolls_back(version: str | None) -> bool:
    """Whether servers of a version can go back in a session: Petals 1 and 2 up to 2.2 cannot."""
    try:
        return version is not None and not Version("1") <= Version(version) < Version("2.3.dev0")
    except InvalidVersion:
        return False


def remote_error(peer: str, text: str) -> PeerFailure:
    """Translates a server's error message into our failure."""
    code, message = parse_error(text)
    message = message.strip()[:500]
    if code is not None:
        return PeerFailure(peer, message, code.value)
    for known, meaning in _RETRIED.items():
        if known in text:
            return PeerFailure(peer, message, meaning.value if meaning is not None else None)
    if not message:
        return PeerFailure(peer, "failed without a message")
    return PeerFailure(peer, message, ErrorCode.INTERNAL.value)


class PetalsCalls:
    """Petals' methods of one server.

    Args:
        p2p: this process's peer.
        peer: the server's base58 id.
        stats: counts bytes.

    Attributes:
        compression: of tensors sent to the server, one of hivemind's.
        max_unary_bytes: size of a request's or an answer's tensors above which a stream is used.
        can_roll_back: the server heeds a step's `start_from_position`; others silently continue after their last
            position.
        moved_at: when bytes were last sent or received on one of the streams.
    """

    def __init__(self, p2p: P2P, peer: str, stats: TransferStats):
        self._p2p, self.peer, self._stats = p2p, peer, stats
        self.compression = NONE
        self.max_unary_bytes = MAX_UNARY_BYTES // 2
        self.can_roll_back = True
        self.moved_at = 0.0

    async def info(self, uid: str) -> ServerInfo:
        """The server's description of a block and of itself. Raises PeerFailure, as all methods here."""
        answer = await self._unary("rpc_info", ExpertUID(uid=uid), ExpertInfo)
        with self.broken_protocol_is_failure():
            return ServerInfo.from_message(answer)

    async def forward(self, request: PetalsForward, on_sent: Callable[[], None] = lambda: None) -> torch.Tensor:
        """[B, S, H]; `on_sent` is called when the request has been sent, if that is known."""
        return (await self._run("rpc_forward", request, [list(request.hidden.shape)], on_sent))[0]

    async def backward(
        self, request: PetalsBackward, on_sent: Callable[[], None] = lambda: None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of hidden [B, S, H] and of prompts [n, B, P, H] if the request has prompts."""
        shapes = [list(request.hidden.shape)]
        if request.prompts is not None:
            blocks, _, *rest = request.prompts.shape
            shapes.append([blocks, len(request.hidden), *rest])
        hidden, *prompts = await self._run("rpc_backward", request, shapes, on_sent)
        return hidden, prompts[0] if prompts else None

    async def open_inference(self, first: PetalsStep) -> InferenceCall:
        """A session with the blocks and length of `first`; the server is contacted by the first `step`."""
        return InferenceCall(self, await self._open("rpc_inference"), first)

    def compressible(self, request: R) -> R:
        """The request in a dtype that can be compressed: hivemind does not compress bfloat16."""
        if self.compression == NONE:
            return request
        wide = {
            name: tensor.float()
            for name in ("hidden", "grad", "prompts")
            if (tensor := getattr(request, name, None)) is not None and tensor.dtype == torch.bfloat16
        }
        return replace(request, **wide)

    @contextmanager
    def broken_protocol_is_failure(self) -> Iterator[None]:
        try:
            yield
        except (ProtocolError, DecodeError) as e:
            raise PeerFailure(self.peer, f"protocol broken: {e}") from e

    async def _run(
        self,
        method: str,
        request: PetalsForward | PetalsBackward,
        shapes: list[list[int]],
        on_sent: Callable[[], None],
    ) -> list[torch.Tensor]:
        parts = self.compressible(request).to_parts()
        compressions = [self.compression] * len(parts.tensors)
        max_bytes = _BYTES_A_VALUE * sum(torch.Size(shape).numel() for shape in shapes)
        # Servers usually answer in the request's dtype. A unary answer that is too long never arrives.
        size = max(sum(t.nbytes for t in parts.tensors), 4 * sum(torch.Size(shape).numel() for shape in shapes))
        if size <= self.max_unary_bytes:
            answers = [await self._unary(method, parts.to_request(compressions), RESPONSE)]
        else:
            stream, answers = await self._open(f"{method}_stream"), []
            sending = asyncio.ensure_future(stream.send_all(parts.to_stream(compressions), on_sent))
            try:
                while (answer := await stream.receive(max_bytes)) is not None:
                    answers.append(answer)
                    if sum(message.ByteSize() for message in answers) > max_bytes + MAX_HEADER_BYTES:
                        raise PeerFailure(self.peer, "answered with more than was requested")
            finally:
                sending.cancel()
                stream.close()
                await asyncio.gather(sending, return_exceptions=True)  # its errors show in `receive`
            if not answers:
                raise PeerFailure(self.peer, "the stream ended")
        with self.broken_protocol_is_failure():
            tensors = read_response(answers, max_bytes=max_bytes)
            if [list(tensor.shape) for tensor in tensors] != shapes:
                raise ProtocolError(f"it answers {[list(tensor.shape) for tensor in tensors]}, asked for {shapes}")
        return tensors

    async def _open(self, method: str) -> _Stream:
        try:
            reader, writer = await open_stream(self._p2p, self.peer, method_name(method))
        except ConnectionError as e:
            raise PeerFailure(self.peer, f"cannot connect: {e}") from e
        return _Stream(self, reader, writer, self._stats)

    async def _unary(self, method: str, request: ExpertUID | ExpertRequest, answer_type: Any) -> Any:
        self._stats.bytes_sent += request.ByteSize()
        peer_id = PeerID.from_base58(self.peer)
        try:
            answer = await self._p2p.call_protobuf_handler(peer_id, method_name(method), request, answer_type)
        except P2PHandlerError as e:
            raise remote_error(self.peer, str(e)) from e
        except (P2PDaemonError, OSError, EOFError) as e:
            raise PeerFailure(self.peer, f"cannot be reached: {str(e)[:200] or type(e).__name__}") from e
        except (DecodeError, ProtocolError) as e:
            raise PeerFailure(self.peer, f"protocol broken: {e}") from e
        self._stats.bytes_received += answer.ByteSize()
        return answer


class InferenceCall:
    """One session on the server; made by `PetalsCalls.open_inference`."""

    def __init__(self, calls: PetalsCalls, stream: _Stream, first: PetalsStep):
        self._calls, self._stream, self._first = calls, stream, first
        self._session = str(uuid.uuid4())
        self._has_answered = False

    async def step(
        self, hidden: torch.Tensor, position: int, *, prompts: torch.Tensor | None, hypo_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Runs [B, n, H] after the first `position` positions; returns [B, n, H].

        Args:
            prompts: [L, B or 1, P, H] added to the first P of the new positions.
            hypo_ids: [B]: sample i continues the past of sample hypo_ids[i].

        Raises:
            PeerFailure: the server failed; with code CACHE_LOST the server lives, but has ended the session.
        """
        calls, first = self._calls, self._first
        step = replace(
            first,
            hidden=hidden,
            prompts=prompts,
            hypo_ids=hypo_ids,
            session_id=self._session,
            step_id=str(uuid.uuid4()),
            start_from_position=position,
            max_length=None if self._has_answered else first.max_length,
        )
        parts, max_bytes = calls.compressible(step).to_parts(), _BYTES_A_VALUE * hidden.numel()
        await self._stream.send(parts.to_request([calls.compression] * len(parts.tensors)))
        try:
            answer = await self._stream.receive(max_bytes)
        except PeerFailure as e:
            if not self._has_answered or e.code is not None:
                raise
            answer = None
        if answer is None:
            if not self._has_answered:
                raise PeerFailure(calls.peer, "the stream ended")
            await calls.info(block_uid(first.prefix, first.start))  # tells a dead server from an ended session
            raise PeerFailure(calls.peer, "this session is not held there any more", ErrorCode.CACHE_LOST.value)
        with calls.broken_protocol_is_failure():
            tensors = read_response([answer], max_bytes=max_bytes)
            if len(tensors) != 1 or tensors[0].shape != hidden.shape:
                raise ProtocolError(f"it answers {[list(t.shape) for t in tensors]} to a step {list(hidden.shape)}")
        self._has_answered = True
        return tensors[0]

    def close(self) -> None:
        """Ends the session: the server frees its memory when the stream ends."""
        self._stream.close()


class _Stream:
    """The caller's side of one call."""

    def __init__(
        self, calls: PetalsCalls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stats: TransferStats
    ):
        self._calls, self._peer = calls, calls.peer
        self._reader, self._writer, self._stats = reader, writer, stats

    async def send(self, message: ExpertRequest | RPCError) -> None:
        """Sends a message. If the stream is lost, `receive` raises."""
        if self._writer.is_closing():
            return
        self._stats.bytes_sent += message.ByteSize()
        try:
            await P2P.send_protobuf(message, self._writer)
        except ConnectionError:
            return
        self._calls.moved_at = time.monotonic()

    async def send_all(self, messages: Iterable[ExpertRequest], on_sent: Callable[[], None]) -> None:
        for message in messages:
            await self.send(message)
        await self.send(P2P.END_OF_STREAM)
        on_sent()

    async def receive(self, max_bytes: int) -> ExpertResponse | None:
        """The next message, of up to `max_bytes` of tensors; None at the end of the stream.

        Raises:
            PeerFailure: the server answers with an error, or breaks the format.
        """
        try:
            marker = await self._reader.readexactly(1)
            size = int.from_bytes(await self._reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
            if size > max_bytes + MAX_HEADER_BYTES:
                raise PeerFailure(self._peer, f"protocol broken: {size} bytes are more than was requested")
            data = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._calls.moved_at = time.monotonic()
        self._stats.bytes_received += size
        try:
            if marker == P2P.ERROR_MARKER:
                raise remote_error(self._peer, RPCError.FromString(data).message)
            return RESPONSE.FromString(data)
        except (DecodeError, ProtocolError) as e:
            raise PeerFailure(self._peer, f"protocol broken: {e}") from e

    def close(self) -> None:
        self._writer.close()
