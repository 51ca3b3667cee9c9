"""Two repairs of hivemind's unary calls (1.1.12), which the DHT and Petals' methods use."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from hivemind.p2p.p2p_daemon_bindings.control import ControlClient


def repair_unary_calls(control: ControlClient) -> None:
    """Makes given-up calls harmless; to be done before any call is made or answered."""
    control._pending_calls = _PendingCalls()
    control._handler_tasks = _HandlerTasks()


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
