"""Hedged requests: a request that takes too long is also tried on other servers, and the first answer wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from petals_lightning.errors import PeerFailure

T = TypeVar("T")
Run = Callable[[], Coroutine[Any, Any, T]]


async def race(
    first: Run[T],
    second: Callable[[], Run[T] | None],
    *,
    after: float | None,
    late: Callable[[], float],
    on_failure: Callable[[PeerFailure], None],
) -> tuple[T, bool]:
    """Runs `first`. If it is late, also runs what `second` returns, if anything.

    Args:
        after: seconds of lateness after which `second` is called; None: never.
        late: returns how late the servers of `first` are, in seconds.
        on_failure: called with the failure of one run while the other continues.

    Returns:
        The first answer, and whether it came from `first`; The other run is cancelled.

    Raises:
        PeerFailure: of the run that was left. Any other exception of either run is raised at once.
    """
    only = asyncio.create_task(first())
    running = {only}
    try:
        if after is not None:
            while not only.done() and (left := after - late()) > 0:
                await asyncio.wait([only], timeout=max(left, 0.05))
            if not only.done() and (other := second()) is not None:
                running.add(asyncio.create_task(other()))
        while True:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                running.remove(task)
                failure = task.exception()
                if failure is None:
                    return task.result(), task is only
                if not running or not isinstance(failure, PeerFailure):
                    raise failure
                on_failure(failure)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
