"""Programs of `start_server`: an honest server with small limits, and such as are sick or lie.

The latter claim to be the fastest by far.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from petals_lightning.cli.main import main
from petals_lightning.options import command_line
from petals_lightning.protocol.messages import ErrorCode, Message, Method
from petals_lightning.protocol.records import ServerRecord
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.refusal import Refusal
from petals_lightning.server.server import Server
from petals_lightning.server.stream_requests import StreamRequests

MIB = 1 << 20
REQUESTS, GRAPHS, CACHE = 1024 * MIB, 512 * MIB, 256 * MIB
"""Memory that clients may take of the honest server."""


def honest() -> None:
    sys.argv += command_line(
        ServerLimits(
            graph_bytes=GRAPHS, cache_bytes=CACHE, max_message_bytes=256 * MIB, max_client_bytes=512 * MIB,
            max_total_bytes=REQUESTS,
        )
    )  # fmt: skip
    main()


def _serve(**methods: Any) -> None:
    """`petals-lightning serve` with other methods of `StreamRequests` and `ClientStream`, and a claim of speed."""
    for name, method in methods.items():
        setattr(StreamRequests if hasattr(StreamRequests, name) else ClientStream, name, method)
    record = Server._record

    def claim(self: Server, *args: Any) -> ServerRecord:
        return replace(record(self, *args), tokens_per_second=1e9)

    setattr(Server, "_record", claim)  # noqa: B010
    main()


def _raising(error: Exception) -> Callable[..., Any]:
    async def fail(self: StreamRequests, *args: Any) -> Message:
        raise error

    return fail


def fails_inside() -> None:
    fail = _raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
    _serve(_forward=fail, _backward=fail, _step=fail)


def fails_in_backward() -> None:
    _serve(_backward=_raising(RuntimeError("CUDA error: an illegal memory access was encountered")))


def calls_all_requests_bad() -> None:
    fail = _raising(Refusal(ErrorCode.BAD_REQUEST, "your tensors are wrong"))
    _serve(_forward=fail, _backward=fail, _step=fail)


def loses_all_graphs() -> None:
    _serve(_backward=_raising(Refusal(ErrorCode.GRAPH_LOST, "the kept graph is gone")))


def loses_all_prompts() -> None:
    _serve(_forward=_raising(Refusal(ErrorCode.ADAPTER_LOST, "this adapter is not registered here any more")))


def refuses_everybody() -> None:
    fail = _raising(Refusal(ErrorCode.OVERLOADED, "come back later"))
    _serve(_forward=fail, _backward=fail, _step=fail)


def is_silent() -> None:
    async def wait(self: StreamRequests, *args: Any) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    _serve(_forward=wait, _backward=wait, _step=wait)


def has_a_queue_that_never_ends() -> None:
    async def wait(self: StreamRequests, *args: Any) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    def positions(self: ClientStream) -> list[list[int]]:
        return [[call_id, 1] for call_id in self._tasks]

    _serve(_forward=wait, _backward=wait, _step=wait, _queue_positions=positions)


def _answering(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    honest = {name: getattr(StreamRequests, name) for name in ("_forward", "_backward", "_step")}

    def lying(method: Callable[..., Any]) -> Callable[..., Any]:
        async def answer(self: StreamRequests, *args: Any) -> Message:
            message = await method(self, *args)
            message.tensors = {name: change(tensor) for name, tensor in message.tensors.items()}
            return message

        return answer

    _serve(**{name: lying(method) for name, method in honest.items()})


def answers_not_a_number() -> None:
    _answering(lambda tensor: torch.full_like(tensor, math.nan))


def answers_absurd_numbers() -> None:
    _answering(lambda tensor: torch.full_like(tensor, 1e38))


def answers_another_shape() -> None:
    _answering(lambda tensor: tensor[..., :-1])


def answers_far_too_much() -> None:
    _answering(lambda tensor: tensor.new_zeros(1 << 26))  # 256 MiB


def writes_nonsense() -> None:
    async def answer(self: ClientStream, *args: Any) -> Message:
        self._writer._writer.write(b"\xff" * 1000)
        return Message(Method.OK, {"kept": True})

    _serve(_result=answer)


SERVERS: dict[str, Callable[[], None]] = {
    program.__name__.replace("_", " "): program
    for program in (
        fails_inside,
        fails_in_backward,
        calls_all_requests_bad,
        loses_all_graphs,
        loses_all_prompts,
        refuses_everybody,
        is_silent,
        has_a_queue_that_never_ends,
        answers_not_a_number,
        answers_absurd_numbers,
        answers_another_shape,
        answers_far_too_much,
        writes_nonsense,
    )
}
