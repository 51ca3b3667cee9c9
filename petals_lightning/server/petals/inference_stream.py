"""A Petals client's inference session: one stream with a step per message, and steps that other servers push.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of new positions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import ExpertRequest

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.calls import RequestJoiner, to_response
from petals_lightning.protocol.petals.steps import PetalsStep
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import DTYPE_NAMES
from petals_lightning.server.petals.stream import Arrival, CallStream
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.sessions.batched_decoding import DecodeStep

logger = logging.getLogger(__name__)

_REMEMBERED_STEPS = 64  # ids kept to recognise late copies
_MAX_PUSHES = 4  # at once
_MAX_WAIT = 60.0  # seconds that a client may wait for memory for keys and values
_POLL_PERIOD = 0.1  # seconds


class InferenceStream:
    """Serves one `rpc_inference` call.

    Args:
        resources: of the server.
        peer: the client's base58 id.
        admit: checks a step's blocks, adapter and sizes; raises Refusal or ProtocolError.
        push: sends a step to another server.
        sessions: the server's sessions that others can push to, by session id.
    """

    def __init__(
        self,
        resources: ServerResources,
        peer: str,
        stream: CallStream,
        *,
        admit: Callable[[PetalsStep], None],
        push: Callable[[str, ExpertRequest], Coroutine[Any, Any, None]],
        sessions: dict[str, InferenceStream],
    ):
        self._resources, self._peer, self._stream = resources, peer, stream
        self._admit, self._push, self._sessions = admit, push, sessions
        self._number = next(resources.stream_numbers)
        self._session_id: str | None = None
        self._max_length: int | None = None  # None until the first step
        self._active_adapter: str | None = None
        self._position = 0
        self._done: deque[str] = deque(maxlen=_REMEMBERED_STEPS)
        self._pushes: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Runs steps until the client ends the session. Raises the error that ends it otherwise."""
        try:
            while (arrival := await self._stream.next()) is not None:
                try:
                    if not arrival.message.tensors:
                        return
                    await self._take(arrival)
                finally:
                    arrival.release()
        finally:
            if self._session_id is not None:
                del self._sessions[self._session_id]
            self._resources.caches.drop_stream(self._number)
            for task in list(self._pushes):
                task.cancel()
            await asyncio.gather(*self._pushes, return_exceptions=True)

    def offer(self, arrival: Arrival) -> bool:
        """Takes a pushed step; False if the queue is full."""
        return self._stream.offer(arrival)

    async def _take(self, arrival: Arrival) -> None:
        charge = self._stream.charge
        joiner = RequestJoiner(max_bytes=self._resources.limits.max_message_bytes, reserve=charge.reserve)
        self._resources.open_requests += 1
        try:
            joiner.add(arrival.message)
            await self._answer(PetalsStep.from_parts(joiner.finish()), is_pushed=arrival.pushed)
        except (ProtocolError, Refusal) as e:
            if not arrival.pushed:
                raise
            logger.debug("a step pushed to a session of …%s is dropped: %s", self._peer[-6:], e)
        finally:
            self._resources.open_requests -= 1
            charge.release(joiner.num_bytes)

    async def _answer(self, step: PetalsStep, *, is_pushed: bool) -> None:
        if step.step_id is not None and step.step_id in self._done:
            return  # the other copy came first, and its answer is on the way
        if is_pushed and (self._max_length is None or step.start_from_position not in (None, self._position)):
            return  # only the client may open a session or go back in it; it sends its own copy
        self._admit(step)
        out = await self._run(step)
        if step.step_id is not None:
            self._done.append(step.step_id)
        if step.next_servers and step.prompts is None and len(self._pushes) < _MAX_PUSHES:
            self._push_on(step, out)  # before answering, or the client's own copy arrives first
        await self._stream.send(to_response([out]))

    async def _run(self, step: PetalsStep) -> torch.Tensor:
        """Runs a step; returns its hidden states [B, n, H] on the CPU."""
        span, key = self._resources.span, (self._number, 0)
        position = self._position if step.start_from_position is None else step.start_from_position
        if position > self._position:
            raise ProtocolError(f"start_from_position {position} where {self._position} positions are held")
        opens = self._max_length is None
        if opens:
            if step.max_length is None:
                raise ProtocolError("the first step of a session must say its max_length")
            self._register(step.session_id)
            self._max_length, self._active_adapter = step.max_length, step.active_adapter
        # Between its steps with prompts, a session has the adapter of its first step.
        adapter = None
        if opens or step.prompts is not None:
            adapter = self._resources.petals_adapter(step.start, step.end, step.prompts, self._active_adapter)
        request = StepRequest(
            0, step.start, step.end, step.hidden, position, self._max_length,
            adapter=adapter,
            hypo_ids=step.hypo_ids, wire_dtype=DTYPE_NAMES[span.dtype],
        )  # fmt: skip
        if opens:
            await self._open_cache(request, step.alloc_timeout)
        cache = self._resources.caches.get(key)
        if cache is None:
            raise Refusal(ErrorCode.CACHE_LOST, "this session is not held here any more")
        cache.check(request)
        self._position = position
        if not step.hidden.shape[1]:  # only asks for memory
            return step.hidden.to(span.dtype)

        work = DecodeStep(span, cache, request, is_alone=self._resources.caches.is_alone(key))
        result = await self._resources.compute.run(work.priority, work, client=self._peer)
        self._position += step.hidden.shape[1]
        return result.value["hidden"]

    async def _open_cache(self, request: StepRequest, timeout: float) -> None:
        deadline = time.monotonic() + min(timeout, _MAX_WAIT)
        while True:
            try:
                return self._resources.open_cache((self._number, 0), request, self._peer)
            except Refusal:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_POLL_PERIOD)

    def _register(self, session_id: str | None) -> None:
        if session_id is not None:
            if session_id in self._sessions:
                raise ProtocolError("session_id names a session that is open here already")
            self._sessions[session_id] = self
            self._session_id = session_id

    def _push_on(self, step: PetalsStep, out: torch.Tensor) -> None:
        hop, *further = step.next_servers
        pushed = replace(
            step, start=hop.start, end=hop.end, hidden=out, session_id=hop.session_id, next_servers=further, pushed=True
        )
        task = asyncio.create_task(self._push(hop.peer, pushed.to_parts().to_request()))
        self._pushes.add(task)
        task.add_done_callback(self._pushes.discard)
