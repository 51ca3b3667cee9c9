"""Repairs of what any peer could break in hivemind 1.1.12: its unary calls, and its reading of msgpack."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import UUID

from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.utils.serializer import MSGPackSerializer

_MAX_DEPTH = 16


def repair_unary_calls(control: ControlClient) -> None:
    """Makes given-up calls harmless; to be done before any call is made or answered."""
    control._pending_calls = _PendingCalls()
    control._handler_tasks = _HandlerTasks()


def acknowledge_end(control: ControlClient) -> None:
    """Retrieves the tasks' exceptions, so that asyncio does not log that nobody did."""
    for task in (control._read_task, control._write_task):
        if task is not None and task.done() and not task.cancelled():
            task.exception()


class _PendingCalls(dict[UUID, "asyncio.Future[bytes]"]):
    """Calls to other peers, of which those that have ended count as gone.

    hivemind sets the result of a call that was given up in the same turn of the loop. That ends its reader, and with
    it, for good, every unary call from and to this peer.
    """

    def __contains__(self, call_id: object) -> bool:
        call = self.get(call_id)  # type: ignore[call-overload]
        return call is not None and not call.done()


class _HandlerTasks(dict[UUID, "asyncio.Task[Any]"]):
    """Calls from other peers. hivemind keeps those that their callers have given up, and what they hold, for ever."""

    def __setitem__(self, call_id: UUID, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda done: self.pop(call_id, None))


def bound_nesting() -> None:
    """Makes hivemind refuse msgpack whose tuples are nested deeply, in this process.

    It recurses as deep as the bytes say: 4 KB, in a DHT record or a request, overflow the stack and end the process.
    """
    decode, nesting = MSGPackSerializer._decode_ext_types, threading.local()
    if hasattr(decode, "is_bounded"):
        return

    def bounded(type_code: int, data: bytes) -> Any:
        nesting.depth = getattr(nesting, "depth", 0) + 1
        try:
            if nesting.depth > _MAX_DEPTH:
                raise ValueError(f"msgpack with tuples nested more than {_MAX_DEPTH} deep")
            return decode(type_code, data)
        finally:
            nesting.depth -= 1

    bounded.is_bounded = True  # type: ignore[attr-defined]
    MSGPackSerializer._decode_ext_types = bounded  # type: ignore[method-assign]
