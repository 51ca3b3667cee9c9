"""The compute thread: order, errors, cancelled requests, and its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from petals_lightning.server.compute import ComputeThread, Priority


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.stop(timeout=5)  # a test that failed may have left it occupied


async def hold(compute: ComputeThread) -> Callable[[], None]:
    """Occupies the thread until the returned function is called."""
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()

    holder = asyncio.create_task(compute.run(Priority.DECODE, wait))
    await begun.wait()
    assert not holder.done()
    return go_on.set


def test_requests_run_by_priority_and_then_by_arrival(compute):
    async def main() -> list[str]:
        release, order = await hold(compute), []
        wanted = [
            (Priority.FORWARD, "f1"), (Priority.BACKWARD, "b1"), (Priority.FORWARD, "f2"), (Priority.DECODE, "d1"),
            (Priority.BACKWARD, "b2"), (Priority.DECODE, "d2"),
        ]  # fmt: skip
        tasks = [
            asyncio.create_task(compute.run(priority, lambda name=name: order.append(name)))
            for priority, name in wanted
        ]
        await asyncio.sleep(0)
        release()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(main()) == ["d1", "d2", "b1", "b2", "f1", "f2"]


def test_a_result_says_how_long_it_waited_and_took(compute):
    async def main():
        release = await hold(compute)
        task = asyncio.create_task(compute.run(Priority.FORWARD, lambda: threading.Event().wait(0.02)))
        await asyncio.sleep(0.02)
        release()
        return await task

    timed = asyncio.run(main())
    assert timed.value is False
    assert timed.queued >= 0.015
    assert timed.computed >= 0.015


@pytest.mark.parametrize("error", [ValueError("wrong"), MemoryError()], ids=repr)
def test_an_exception_reaches_its_caller_and_the_thread_goes_on(compute, error):
    def fail() -> None:
        raise error

    async def main() -> int:
        with pytest.raises(type(error)):
            await asyncio.wait_for(compute.run(Priority.FORWARD, fail), 10)
        return (await compute.run(Priority.FORWARD, lambda: 5)).value

    assert asyncio.run(main()) == 5


def test_a_request_that_was_cancelled_while_it_waited_never_runs(compute):
    async def main() -> list[str]:
        release, ran = await hold(compute), []
        cancelled = asyncio.create_task(compute.run(Priority.FORWARD, lambda: ran.append("cancelled")))
        other = asyncio.create_task(compute.run(Priority.FORWARD, lambda: ran.append("other")))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        release()
        await other
        return ran

    assert asyncio.run(main()) == ["other"]


def test_a_request_that_was_cancelled_while_it_ran_is_dropped(compute):
    async def main() -> int:
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            compute.run(Priority.FORWARD, lambda: (loop.call_soon_threadsafe(begun.set), go_on.wait()))
        )
        await begun.wait()
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await compute.run(Priority.FORWARD, lambda: 7)).value

    assert asyncio.run(main()) == 7


def test_an_idle_thread_holds_nothing_of_the_last_request(compute):
    class Tensors:
        pass

    async def main() -> weakref.ref:
        result = await compute.run(Priority.FORWARD, Tensors)
        return weakref.ref(result.value)

    kept = asyncio.run(main())
    gc.collect()
    assert kept() is None


def test_stop_ends_the_thread_after_what_runs_and_drops_what_waits():
    compute = ComputeThread()

    async def main() -> list[str]:
        release, ran = await hold(compute), []
        waiting = asyncio.create_task(compute.run(Priority.DECODE, lambda: ran.append("waiting")))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(compute.stop))
        while not compute._stopping:
            await asyncio.sleep(0.001)
        release()
        await stopping
        waiting.cancel()
        return ran

    assert asyncio.run(main()) == []
    assert not compute._thread.is_alive()
