"""A server that offers only Petals' methods, behind the interface of our own connection.

Our messages are translated here and nowhere else: the pipeline, sessions, retries and audits know one kind of server.
Only what such a server cannot do is left out: it keeps no graph (a backward sends the inputs again), takes the prefix
as part of every sample, and returns all positions. Petals' protocol has no heartbeat. While an answer is owed,
`rpc_info` is called instead, which servers answer while they compute.

Shapes: B batch, S tokens, P virtual tokens, H hidden size.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Self

import torch
from hivemind.p2p import P2P

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.flow_control import RequestWindow
from petals_lightning.client.petals.calls import MAX_BATCH_TOKENS, PetalsCalls, rolls_back
from petals_lightning.client.petals.session import PetalsSession
from petals_lightning.client.petals.shapes import (
    active_name,
    input_grads,
    output_grad,
    output_of,
    prompts_of,
    with_prefix,
)
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.errors import PeerFailure
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode, Message, Method
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.uids import block_uid

_MAX_REQUESTS, _MAX_BYTES = 16, 256 << 20  # in flight together: such servers do not state their limits
_ADAPTERS_KEPT = 8


class PetalsConnection:
    """A connection by Petals' methods; made by `open`. See `ServerConnection`.

    Args:
        calls: the server's methods.
        dht_prefix: the model's name.
        block: a block that the server holds.
        config, stats: of the client.
        on_failure: called once if the server hangs.

    Attributes:
        sliding_window: of the model; None: unlimited.
    """

    cuts_steps = True

    def __init__(
        self,
        calls: PetalsCalls,
        dht_prefix: str,
        block: int,
        config: ClientConfig,
        stats: TransferStats,
        on_failure: Callable[[PeerFailure], None] = lambda failure: None,
    ):
        self.peer = calls.peer
        self.info: dict[str, Any] = {}
        self.round_trip: float | None = None
        self._calls, self._prefix, self._uid = calls, dht_prefix, block_uid(dht_prefix, block)
        self._config, self._stats, self._on_failure = config, stats, on_failure
        self.sliding_window: int | None = None
        self._ids = itertools.count(1)
        self._window = RequestWindow(_MAX_REQUESTS, _MAX_BYTES)
        self._adapters: OrderedDict[tuple[int, int, int], tuple[int, Adapter]] = OrderedDict()
        self._sessions: dict[int, PetalsSession] = {}
        self._failure: PeerFailure | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._under_way = 0
        self._pinged_at: float | None = None
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> Self:
        """Starts to monitor the server."""
        self._watching = asyncio.create_task(self._watch())
        return self

    @classmethod
    async def open(
        cls,
        p2p: P2P,
        peer: str,
        dht_prefix: str,
        block: int,
        config: ClientConfig,
        stats: TransferStats,
        on_failure: Callable[[PeerFailure], None] = lambda failure: None,
        sliding_window: int | None = None,
    ) -> PetalsConnection:
        """Asks the server what it holds.

        Raises:
            PeerFailure: the server cannot be reached in `connect_timeout` seconds, or does not hold the block.
        """
        calls = PetalsCalls(p2p, peer, stats)
        began = time.perf_counter()
        try:
            async with asyncio.timeout(config.connect_timeout):
                info = await calls.info(block_uid(dht_prefix, block))
        except TimeoutError as e:
            raise PeerFailure(peer, f"does not answer in {config.connect_timeout:.0f} s") from e
        connection = cls(calls, dht_prefix, block, config, stats, on_failure).start()
        connection.round_trip = time.perf_counter() - began
        connection.info = {
            "version": info.version,
            "hidden_size": info.hidden_size,
            "max_batch_tokens": MAX_BATCH_TOKENS,
        }
        connection.sliding_window = sliding_window
        calls.compression, calls.can_roll_back = info.compression, rolls_back(info.version)
        return connection

    @property
    def is_open(self) -> bool:
        return self._failure is None

    @property
    def silence(self) -> float:
        return time.monotonic() - self._pinged_at if self._pinged_at is not None else 0.0

    async def call(
        self,
        message: Message,
        call_id: int | None = None,
        *,
        deadline: float | None = None,
        clock: ServiceTimer | None = None,
    ) -> Message:
        clock = clock or ServiceTimer()
        clock.pause()
        began = time.perf_counter()
        async with self._window.enter(message.num_bytes):
            clock.restart()
            answer = self._answer(message, clock.restart)
            tensors = await self._in_time(answer, deadline or self._config.request_timeout, clock)
        self._stats.requests += message.method in (Method.FORWARD, Method.BACKWARD)
        # Such servers do not report how long they computed.
        elapsed = time.perf_counter() - began
        compute = max(elapsed - (self.round_trip or 0.0), 0.1 * elapsed)
        wire_dtype = message.fields["wire_dtype"]
        return Message(
            Method.OK, {"compute": compute}, {name: to_wire(tensor, wire_dtype) for name, tensor in tensors.items()}
        )

    def next_id(self) -> int:
        return next(self._ids)

    async def register_adapter(self, adapter: Adapter, wire_dtype: str) -> int:
        """Keeps it here: such servers store none. Deep prompts, and an active adapter's name, go with every request."""
        assert not adapter.lora, "these servers are left out where there is LoRA"
        assert not adapter.past, "these servers are left out where there is a trained prefix"
        identity = (adapter.version, adapter.start, adapter.end)
        if identity not in self._adapters:
            sent = adapter.map(lambda tensor: to_wire(tensor, wire_dtype, shared=True))
            self._adapters[identity] = self.next_id(), sent
            while len(self._adapters) > _ADAPTERS_KEPT:
                self._adapters.popitem(last=False)
        return self._adapters[identity][0]

    def forget_adapters(self) -> None:
        self._adapters.clear()

    def tell(self, message: Message, call_id: int = 0) -> None:
        if message.method is Method.END_SESSION:
            self._end_session(message.fields["session"])

    def close(self) -> None:
        self._on_failure = lambda failure: None
        self._fail(PeerFailure(self.peer, "the connection was closed"))

    async def _answer(self, message: Message, on_sent: Callable[[], None]) -> dict[str, torch.Tensor]:
        match message.method:
            case Method.FORWARD:
                return await self._forward(ForwardRequest.from_message(message.fields, message.tensors), on_sent)
            case Method.BACKWARD:
                return await self._backward(BackwardRequest.from_message(message.fields, message.tensors), on_sent)
            case Method.STEP:
                return await self._step(StepRequest.from_message(message.fields, message.tensors), on_sent)
        raise AssertionError(f"{message.method} has no equivalent in Petals' protocol")

    async def _forward(self, request: ForwardRequest, on_sent: Callable[[], None]) -> dict[str, torch.Tensor]:
        self._find_adapter(request)
        hidden, prompts = with_prefix(request.hidden, request.prefix), prompts_of(request)
        active = active_name(request)
        outputs = [
            await self._calls.forward(
                PetalsForward(self._prefix, request.start, request.end, piece, prompts, active_adapter=active), on_sent
            )
            for piece in hidden.split(_samples_at_once(hidden))
        ]
        return output_of(request, torch.cat(outputs))

    async def _backward(self, request: BackwardRequest, on_sent: Callable[[], None]) -> dict[str, torch.Tensor]:
        forward = request.forward
        assert forward is not None, "such servers keep no graphs, so no request names one"
        self._find_adapter(forward)
        hidden, prompts = with_prefix(forward.hidden, forward.prefix), prompts_of(forward)
        grad, size = output_grad(request, forward), _samples_at_once(hidden)
        blocks, active = (self._prefix, forward.start, forward.end), active_name(forward)
        answers = [
            await self._calls.backward(
                PetalsBackward(*blocks, piece, piece_grad, prompts, active_adapter=active), on_sent
            )
            for piece, piece_grad in zip(hidden.split(size), grad.split(size), strict=True)
        ]
        grad_prompts = [of_prompts for _, of_prompts in answers if of_prompts is not None]
        return input_grads(
            forward,
            torch.cat([of_hidden for of_hidden, _ in answers]),
            torch.cat(grad_prompts, 1) if prompts is not None else None,
        )

    def _find_adapter(self, request: ForwardRequest | StepRequest) -> None:
        if request.adapter_key is not None:
            kept = self._adapters.values()
            request.adapter = next((adapter for key, adapter in kept if key == request.adapter_key), None)
            if request.adapter is None:
                raise PeerFailure(self.peer, "this adapter is not kept any more", ErrorCode.ADAPTER_LOST.value)

    async def _step(self, request: StepRequest, on_sent: Callable[[], None]) -> dict[str, torch.Tensor]:
        self._find_adapter(request)
        if request.max_length is not None:
            self._end_session(request.session)
            self._sessions[request.session] = PetalsSession(self._calls, self._prefix, request, self.sliding_window)
        session = self._sessions.get(request.session)
        if session is None:
            raise PeerFailure(self.peer, "this session is not held there any more", ErrorCode.CACHE_LOST.value)
        return await session.step(request, on_sent)

    def _end_session(self, number: int) -> None:
        if (session := self._sessions.pop(number, None)) is not None:
            session.close()

    async def _in_time(self, answer: Any, deadline: float, clock: ServiceTimer) -> dict[str, torch.Tensor]:
        """The answer; raises PeerFailure if the connection is lost or the server exceeds the deadline."""
        task = asyncio.ensure_future(answer)
        self._under_way += 1
        try:
            while not task.done():
                if self._failure is not None:
                    raise self._failure
                if (left := deadline - clock.seconds) <= 0:
                    raise PeerFailure(self.peer, f"no answer after {clock.seconds:.0f} s of work on a request")
                await asyncio.wait([task, self._lost], timeout=left, return_when=asyncio.FIRST_COMPLETED)
            return task.result()
        finally:
            self._under_way -= 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        """Detects a hung server while an answer is owed."""
        period, limit = self._config.heartbeat_period, self._config.heartbeat_timeout
        while True:
            await asyncio.sleep(period)
            if not self._under_way:
                continue
            self._pinged_at = time.monotonic()
            try:
                async with asyncio.timeout(limit - min(period, limit / 2)):
                    await self._calls.info(self._uid)
                self._pinged_at = None
            except TimeoutError:
                if time.monotonic() - self._calls.moved_at > limit:  # else the connection is busy with a transfer
                    self._fail(PeerFailure(self.peer, f"a ping was not answered for {self.silence:.0f} s"))
                    return
            except PeerFailure as e:
                if e.code is None:
                    self._fail(e)
                    return
                self._pinged_at = None  # it answers, if only that it is busy

    def _fail(self, failure: PeerFailure) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._lost.set_result(None)
        for number in list(self._sessions):
            self._end_session(number)
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._watching.cancel()
        self._on_failure(failure)


def _samples_at_once(hidden: torch.Tensor) -> int:
    """Samples of [B, P + S, H] per request: a micro-batch made for other servers may be too large for this one."""
    return max(MAX_BATCH_TOKENS // hidden.shape[1], 1)
