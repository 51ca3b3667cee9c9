"""The one thread that computes. Requests wait in a queue by priority, then by arrival."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

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
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._arrival = itertools.count()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    async def run(self, priority: Priority, function: Callable[[], T]) -> Timed[T]:
        """Runs `function` when its turn comes; if the caller is cancelled before that, it never runs."""
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
                loop.call_soon_threadsafe(_set, result, None, e)
            else:
                timed = Timed(value, started - arrived, time.perf_counter() - started)
                loop.call_soon_threadsafe(_set, result, timed, None)

        self._queue.put((priority, next(self._arrival), job))
        return await result

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after what is running, without waiting for that longer than `timeout` seconds.

        What waits in the queue never runs, and its callers must be cancelled.
        """
        self._queue.put((-1, next(self._arrival), None))
        self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._queue.get()[2]) is not None:
            job()
            del job  # or an idle thread would hold the last request's tensors


def _set(future: asyncio.Future[Timed[T]], value: Timed[T] | None, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert value is not None
        future.set_result(value)
