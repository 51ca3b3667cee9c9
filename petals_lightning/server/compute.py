"""The one thread that computes. Requests wait in a queue that is fair between clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from petals_lightning.server.fair_queue import FairQueue

T = TypeVar("T")


class Priority(IntEnum):
    """Lower runs first: a step of a conversation is short and somebody waits for it."""

    DECODE = 0
    BACKWARD = 1  # frees a kept graph, so it goes before new forwards
    FORWARD = 2


@dataclass
class Timed(Generic[T]):
    """A result with the seconds it waited and the seconds it took."""

    value: T
    queued: float
    computed: float


class ComputeThread:
    """Runs functions one after another; torch releases the interpreter lock, so the event loop goes on."""

    def __init__(self) -> None:
        self._queue: FairQueue[Callable[[], None]] = FairQueue()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def ahead(self, key: Hashable) -> int:
        """About how many requests run before the one under `key`; 0 if it runs already or is done."""
        with self._changed:
            position = self._queue.ahead(key)
        return 0 if position is None else position + 1  # one is running

    async def run(
        self, priority: Priority, function: Callable[[], T], *, client: str = "", key: Hashable = None
    ) -> Timed[T]:
        """Runs `function` when its turn comes; if the caller is cancelled before that, it never runs.

        Args:
            priority: among the requests of one client.
            client: whose share of the compute this counts on.
            key: names the request for `ahead`.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Timed[T]] = loop.create_future()
        arrived = time.perf_counter()

        def job() -> None:
            if result.cancelled():
                return
            started = time.perf_counter()
            try:
                value = function()
            except BaseException as e:
                outcome: tuple[Timed[T] | None, BaseException | None] = None, e
            else:
                outcome = Timed(value, started - arrived, time.perf_counter() - started), None
            if not loop.is_closed():  # it is where the server has stopped without waiting for this
                loop.call_soon_threadsafe(_set, result, *outcome)

        with self._changed:
            ticket = self._queue.put(client, priority, job, key)
            self._changed.notify()
        try:
            return await result
        except asyncio.CancelledError:
            with self._changed:
                self._queue.discard(ticket)  # and with it the request's tensors
            raise

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after what is running, without waiting for that longer than `timeout` seconds.

        What waits in the queue never runs, and its callers must be cancelled.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._stopping and (ticket := self._queue.pop()) is None:
                    self._changed.wait()
                if self._stopping:
                    return
            assert ticket is not None
            client, began = ticket.client, time.perf_counter()
            ticket.item()
            del ticket  # or an idle thread would hold the last request's tensors
            with self._changed:
                self._queue.charge(client, time.perf_counter() - began)


def _set(future: asyncio.Future[Timed[T]], value: Timed[T] | None, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert value is not None
        future.set_result(value)
