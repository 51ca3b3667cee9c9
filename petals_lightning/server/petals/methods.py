"""The methods of a Petals server: access, charges and answers of their calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID

from petals_lightning import __version__
from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import MAX_HEADER_BYTES, ErrorCode
from petals_lightning.protocol.petals.calls import (
    Parts,
    PetalsBackward,
    PetalsForward,
    RequestJoiner,
    read_request,
    split_response,
    to_response,
)
from petals_lightning.protocol.petals.info import ServerInfo
from petals_lightning.protocol.petals.metadata import error_text, load_dict
from petals_lightning.protocol.petals.methods import (
    MAX_PART_BYTES,
    MAX_UNARY_BYTES,
    TransformerConnectionHandler,
    method_name,
)
from petals_lightning.protocol.petals.steps import PetalsStep
from petals_lightning.protocol.petals.wire import REQUEST
from petals_lightning.protocol.uids import parse_chain
from petals_lightning.server.access.rules import Gate
from petals_lightning.server.blocks.span import SpanInputs
from petals_lightning.server.execution.compute import Priority
from petals_lightning.server.petals.inference_stream import InferenceStream
from petals_lightning.server.petals.reachability import CALL_ERRORS, Reachability
from petals_lightning.server.petals.stream import Arrival, CallStream, Charge, end, end_with_error
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.resources import ServerResources

logger = logging.getLogger(__name__)

_MAX_UNARY_RESPONSE = MAX_PART_BYTES - MAX_HEADER_BYTES  # a larger response never arrives, and the caller hangs
_PUSH_TIMEOUT = 10.0  # seconds
_UNARY_COPIES = 6  # of a request in memory: as received, joined, and up to four bytes per compressed one


class CallFailed(Exception):
    """An error of a unary call; hivemind sends its `repr` to the client."""

    def __repr__(self) -> str:
        return str(self)


StreamMethod = Callable[[CallStream, str], Awaitable[None]]


class PetalsMethods:
    """Answers Petals clients.

    Args:
        resources: of the server.
        dht_prefix: name of the model in the blocks' uids.
        p2p: this server's peer.
    """

    def __init__(self, resources: ServerResources, dht_prefix: str, p2p: P2P):
        self._resources, self._dht_prefix, self._p2p = resources, dht_prefix, p2p
        self._sessions: dict[str, InferenceStream] = {}
        self._reachability = Reachability(resources, p2p)
        self.streams: dict[str, StreamMethod] = {
            method_name("rpc_forward_stream"): self._forward_stream,
            method_name("rpc_backward_stream"): self._backward_stream,
            method_name("rpc_inference"): self._inference,
        }
        """Methods whose calls are streams, by name; for `serve_stream`."""
        self._unary: dict[str, tuple[Callable[[Any, str], Awaitable[Any]], Any]] = {
            method_name("rpc_info"): (self._info, ExpertUID),
            method_name("rpc_forward"): (self._forward_unary, REQUEST),
            method_name("rpc_backward"): (self._backward_unary, REQUEST),
            method_name("rpc_push"): (self._push, REQUEST),
        }

    async def register(self) -> None:
        """Adds the unary methods to this server's peer."""
        for name, (method, kind) in self._unary.items():
            await self._p2p.add_protobuf_handler(name, partial(self.answer_unary, method), kind)
        await self._reachability.register()

    async def unregister(self) -> None:
        """Takes these methods from this server's peer."""
        for name in self._unary:
            await self._p2p.remove_protobuf_handler(name)
        await self._reachability.unregister()

    async def answer_unary(
        self, method: Callable[[Any, str], Awaitable[Any]], request: Any, context: P2PContext
    ) -> Any:
        """Answers one unary call. Raises CallFailed."""
        peer = context.remote_id.to_base58()
        self._resources.open_requests += 1
        try:
            charge = self._let_in(peer)
            try:
                charge.reserve(_UNARY_COPIES * request.ByteSize())
                return await method(request, peer)
            finally:
                charge.close()
        except Exception as e:
            raise CallFailed(self._error(e, peer)) from None
        finally:
            self._resources.open_requests -= 1

    async def serve_stream(
        self, method: StreamMethod, info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serves one call that is a stream, until it is answered or the client leaves."""
        peer, limits = info.peer_id.to_base58(), self._resources.limits
        try:
            charge = self._let_in(peer, has_stream=True)
        except Refusal as e:
            await end_with_error(reader, writer, self._error(e, peer))
            return
        room = limits.max_message_bytes + MAX_HEADER_BYTES
        idle = limits.cache_lifetime if method == self._inference else None
        stream = CallStream(reader, writer, charge, max_message_bytes=room, idle_timeout=idle)
        try:
            error = await self._answer_while_connected(method, stream, peer)
        except BaseException:
            writer.close()
            raise
        finally:
            stream.close()
            charge.close()
        if error is not None:
            await end_with_error(reader, writer, error)
        else:
            await end(reader, writer)

    def _let_in(self, peer: str, *, has_stream: bool = False) -> Charge:
        gate = Gate(self._resources.rules, peer, self._resources.peer_id)
        if not gate.is_open:
            raise Refusal(ErrorCode.NOT_ALLOWED, gate.refusal().fields["message"])
        self._check_staying()
        return Charge(self._resources.quotas, peer, has_stream=has_stream)

    async def _answer_while_connected(self, method: StreamMethod, stream: CallStream, peer: str) -> str | None:
        """As `_answer`; None also if the client leaves before its answer."""
        error = None
        try:
            async with asyncio.TaskGroup() as tasks:
                answering = tasks.create_task(self._answer(method, stream, peer))
                reading = tasks.create_task(stream.read_on())
                answering.add_done_callback(lambda done: reading.cancel())
                reading.add_done_callback(lambda done: answering.cancel())
            error = answering.result() if not answering.cancelled() else None
        except* Exception as e:
            logger.error("a call of …%s ended in disorder", peer[-6:], exc_info=e)
        return error

    async def _answer(self, method: StreamMethod, stream: CallStream, peer: str) -> str | None:
        """Runs a method; returns the message of an error."""
        try:
            await method(stream, peer)
        except ConnectionError:
            logger.debug("client …%s left before its answer", peer[-6:])
        except Exception as e:
            return self._error(e, peer)
        return None

    def _error(self, error: Exception, peer: str) -> str:
        refusal = self._resources.refusal(error, peer)
        return error_text(refusal.code, str(refusal))

    async def _info(self, request: ExpertUID, peer: str) -> ExpertInfo:
        span, resources = self._resources.span, self._resources
        others = resources.open_requests - 1  # without this one
        info = ServerInfo(__version__, resources.cache_tokens_left, open_requests=others)
        if request.uid:
            self._check_served(*parse_chain(request.uid))
            info = replace(info, hidden_size=span.hidden_size, dtype=span.dtype)
        return info.to_message()

    async def _forward_unary(self, request: ExpertRequest, peer: str) -> ExpertResponse:
        parts = read_request(request, max_bytes=self._resources.limits.max_message_bytes)
        return _fit_for_unary(await self._forward(parts, peer))

    async def _backward_unary(self, request: ExpertRequest, peer: str) -> ExpertResponse:
        parts = read_request(request, max_bytes=self._resources.limits.max_message_bytes)
        return _fit_for_unary(await self._backward(parts, peer))

    async def _forward_stream(self, stream: CallStream, peer: str) -> None:
        await self._whole(self._forward, stream, peer)

    async def _backward_stream(self, stream: CallStream, peer: str) -> None:
        await self._whole(self._backward, stream, peer)

    async def _whole(
        self, method: Callable[[Parts, str], Awaitable[ExpertResponse]], stream: CallStream, peer: str
    ) -> None:
        """Answers a call whose request and response come in parts. It is charged until the response is written."""
        joiner = RequestJoiner(max_bytes=self._resources.limits.max_message_bytes, reserve=stream.charge.reserve)
        while (arrival := await stream.next()) is not None:
            try:
                joiner.add(arrival.message)
            finally:
                arrival.release()
        self._resources.open_requests += 1
        try:
            parts = await asyncio.to_thread(joiner.finish)  # copies up to a GiB
            response = await method(parts, peer)
            del joiner, parts
            stream.charge.reserve(response.ByteSize())
            for message in split_response(response):
                await stream.send(message)
        finally:
            self._resources.open_requests -= 1

    async def _forward(self, parts: Parts, peer: str) -> ExpertResponse:
        request = PetalsForward.from_parts(parts)
        self._admit(request)
        span = self._resources.span

        @torch.no_grad()
        def compute() -> ExpertResponse:
            out, _ = span.forward(self._inputs(request))
            return to_response([out], request.output_compression)

        return (await self._resources.compute.run(Priority.FORWARD, compute, client=peer)).value

    async def _backward(self, parts: Parts, peer: str) -> ExpertResponse:
        request = PetalsBackward.from_parts(parts)
        self._admit(request)
        span = self._resources.span

        def compute() -> ExpertResponse:
            graph = span.forward_with_graph(self._inputs(request), input_grad=True)
            grads = span.backward(graph, request.grad, None)
            return to_response([grad.to(span.dtype) for grad in grads.values()], request.output_compression)

        return (await self._resources.compute.run(Priority.BACKWARD, compute, client=peer)).value

    def _inputs(self, request: PetalsForward | PetalsBackward) -> SpanInputs:
        prompts = request.prompts
        if prompts is not None:  # gradients are per sample, even if samples share prompts
            prompts = self._resources.span.transfers.to_device(prompts).expand(-1, len(request.hidden), -1, -1)
        adapter = self._resources.petals_adapter(request.start, request.end, prompts, request.active_adapter)
        return SpanInputs(request.start, request.end, request.hidden, adapter=adapter)

    async def _inference(self, stream: CallStream, peer: str) -> None:
        await InferenceStream(
            self._resources, peer, stream, admit=self._admit, push=self._send_push, sessions=self._sessions
        ).serve()

    async def _push(self, request: ExpertRequest, peer: str) -> ExpertResponse:
        session_id = load_dict(request.metadata).get("session_id")
        session = self._sessions.get(session_id) if isinstance(session_id, str) else None
        if session is not None and request.tensors:  # else it has ended or not begun; the client sends its own copy
            charge = Charge(self._resources.quotas, peer)
            try:
                charge.reserve(request.ByteSize())
                taken = session.offer(Arrival(request, charge.close, pushed=True))
            except Refusal:
                charge.close()
                raise
            if not taken:
                charge.close()
        return ExpertResponse()

    async def _send_push(self, peer: str, request: ExpertRequest) -> None:
        """Pushes a step to the next server, so that it need not wait for the client. A failure loses nothing else."""
        if request.ByteSize() > MAX_UNARY_BYTES:
            return
        try:
            stub = TransformerConnectionHandler.get_stub(self._p2p, PeerID.from_base58(peer))
            await stub.rpc_push(request, timeout=_PUSH_TIMEOUT)
        except CALL_ERRORS as e:
            logger.debug("a push to …%s failed: %r", peer[-6:], e)

    def _admit(self, request: PetalsForward | PetalsBackward | PetalsStep) -> None:
        """Checks a request against the model, the span and the limits. Raises Refusal or ProtocolError."""
        self._check_staying()
        self._check_served(request.prefix, request.start, request.end)
        if request.active_adapter is not None:
            self._resources.adapters.acting(request.active_adapter, request.start, request.end)  # refuses others
        self._resources.check_size(request.start, request.end, request.hidden)
        if request.prompts is not None:
            num_bytes = request.prompts[:, 0].numel() * len(request.hidden) * request.prompts.element_size()
            if num_bytes > (limit := self._resources.limits.max_message_bytes):
                raise ProtocolError(f"prompts for all samples take {num_bytes} bytes, the limit is {limit}")

    def _check_served(self, prefix: str, start: int, end: int) -> None:
        span = self._resources.span
        if prefix != self._dht_prefix or not span.start <= start < end <= span.end:
            raise Refusal(
                ErrorCode.NOT_SERVED,
                f"blocks {start}:{end} of {prefix!r:.100} are not held here, this server has "
                f"{span.start}:{span.end} of {self._dht_prefix!r}",
            )

    def _check_staying(self) -> None:
        if self._resources.leaving:
            raise Refusal(ErrorCode.LEAVING, "the server is shutting down")


def _fit_for_unary(response: ExpertResponse) -> ExpertResponse:
    if (num_bytes := response.ByteSize()) > _MAX_UNARY_RESPONSE:
        raise ProtocolError(
            f"the response has {num_bytes} bytes, and one message takes {_MAX_UNARY_RESPONSE}: call the _stream method"
        )
    return response
