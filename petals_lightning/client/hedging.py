"""A request that is far beyond its time is tried on a second server too; the first answer wins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from petals_lightning.client.deadlines import ServiceClock
from petals_lightning.errors import PeerFailure

T = TypeVar("T")


class Timed(Protocol):
    """What is run: `clock` tells how late its server is."""

    clock: ServiceClock


L = TypeVar("L", bound=Timed)


async def race(
    first: L,
    run: Callable[[L], Awaitable[T]],
    *,
    after: float | None,
    second: Callable[[], L | None],
    on_failure: Callable[[PeerFailure], None],
) -> tuple[L, T]:
    """Runs `first`; if its server is `after` seconds late with it, also what `second` gives, if anything.

    Args:
        after: None never runs a second one.
        on_failure: told of the failure of one while the other still runs.

    Returns:
        The one that answered first, and its answer; the other is cancelled.

    Raises:
        PeerFailure: of the last one left. Other exceptions of either at once.
    """
    only = asyncio.ensure_future(run(first))
    running = {only: first}
    try:
        if after is not None:
            while not only.done() and (left := after - first.clock.late) > 0:
                await asyncio.wait([only], timeout=max(left, 0.05))
            if not only.done() and (other := second()) is not None:
                running[asyncio.ensure_future(run(other))] = other
        while True:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answered = running.pop(task)
                failure = task.exception()
                if failure is None:
                    return answered, task.result()
                if not running or not isinstance(failure, PeerFailure):
                    raise failure
                on_failure(failure)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
