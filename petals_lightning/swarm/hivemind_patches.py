"""Patches for hivemind 1.1.12, in which any peer could break unary calls and the reading of msgpack."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import UUID

from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.utils.serializer import MSGPackSerializer

_MAX_DEPTH = 16


def patch_unary_calls(control: ControlClient) -> None:
    """Makes cancelled calls harmless. Call it before any call is made or answered."""
    control._pending_calls = _PendingCalls()
    control._handler_tasks = _HandlerTasks()


def retrieve_exceptions(control: ControlClient) -> None:
    """Retrieves the tasks' exceptions, so that asyncio does not log "exception was never retrieved"."""
    for task in (control._read_task, control._write_task):
        if task is not None and task.done() and not task.cancelled():
            task.exception()


class _PendingCalls(dict[UUID, "asyncio.Future[bytes]"]):
    """Calls to other peers; those that have ended count as removed.

    hivemind also sets the result of a call that was cancelled in the same turn of the loop. That error ends its reader,
    and with it all later unary calls from and to this peer.
    """

    def __contains__(self, call_id: object) -> bool:
        call = self.get(call_id)  # type: ignore[call-overload]
        return call is not None and not call.done()


class _HandlerTasks(dict[UUID, "asyncio.Task[Any]"]):
    """Calls from other peers. hivemind never removes those that their callers have cancelled."""

    def __setitem__(self, call_id: UUID, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda done: self.pop(call_id, None))


def bound_nesting() -> None:
    """Makes hivemind refuse msgpack with deeply nested tuples, in this process.

    It recurses as deep as the bytes say: 4 KB in a DHT record or a request overflow the stack and end the process.
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
    MSGPackSerializer._decode_ext_types = bounded
