"""An event loop in a background thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from petals_lightning.errors import SwarmConnectionError

T = TypeVar("T")


class LoopThread:
    """A running event loop; `start` makes one. Its methods may be called from any other thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread):
        self.loop, self._thread, self._process = loop, thread, os.getpid()

    @classmethod
    def start(cls, name: str) -> LoopThread:
        """Starts a loop of its own, so that notebooks and callers keep theirs."""
        loop, started = uvloop.new_event_loop(), threading.Event()
        thread = threading.Thread(target=_run, args=(loop, started), name=name, daemon=True)
        thread.start()
        started.wait()
        return cls(loop, thread)

    @property
    def is_of_this_process(self) -> bool:
        """False in a fork of the process that started it: threads are not copied."""
        return self._process == os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs a coroutine and waits for its result; cancels it if the wait is interrupted."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine.

        Raises:
            SwarmConnectionError: this process is a fork of the one that started the loop.
        """
        if not self.is_of_this_process:
            coroutine.close()
            raise SwarmConnectionError(
                "this process was forked from the one that joined the swarm, and has none of its threads: load the "
                "model here, or start the process by 'spawn' (multiprocessing.get_context('spawn'))"
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """Cancels what is still running, and ends the loop and its thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Runs a function in a thread that does not keep the process from ending, unlike those of `asyncio.to_thread`."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as e:
            if not done.cancelled():
                done.set_exception(e)
        else:
            if not done.cancelled():
                done.set_result(result)

    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return await asyncio.wrap_future(done)


def _run(loop: asyncio.AbstractEventLoop, started: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    loop.call_soon(started.set)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        if not task.cancelling():  # else it is cleaning up, which a second cancellation would interrupt
            task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(asyncio.sleep(0))  # closed transports take one more turn
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
