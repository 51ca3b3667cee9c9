"""The compute thread: order, errors, cancelled requests, and its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from petals_lightning.server.execution.compute import Batchable, ComputeThread, Priority


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread().start()
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


class Adding(Batchable[list[int]]):
    """Gives the numbers of the batch that it was in."""

    def __init__(self, number: int, *, size: int = 1, fails: bool = False):
        self.number, self.size, self._fails = number, size, fails

    def __call__(self) -> list[int]:
        if self._fails:
            raise ValueError(f"{self.number} is wrong")
        return [self.number]

    def can_batch(self, others: Sequence[Batchable[list[int]]]) -> bool:
        return len(others) < 3

    def run_batch(self, others: Sequence[Batchable[list[int]]]) -> list[list[int]]:
        batch: list[Any] = [self, *others]
        if any(one._fails for one in batch):
            raise ValueError("one is wrong")
        return [[one.number for one in batch]] * len(batch)


async def run_together(compute: ComputeThread, works: list[Adding], cancelled: int | None = None) -> list[object]:
    """What works give that wait at the same moment, each of a client of its own, or how they fail."""
    release = await hold(compute)
    tasks = [
        asyncio.create_task(compute.run(Priority.DECODE, work, client=f"c{number}"))
        for number, work in enumerate(works)
    ]
    await asyncio.sleep(0)
    if cancelled is not None:
        tasks[cancelled].cancel()
    release()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(one) if isinstance(one, BaseException) else one.value for one in done]


def test_work_that_joins_runs_as_one_batch_up_to_its_limit(compute):
    got = asyncio.run(run_together(compute, [Adding(number) for number in range(4)]))
    assert got == [[0, 1, 2]] * 3 + [[3]]


def test_one_that_fails_or_is_cancelled_harms_no_other_in_its_batch(compute):
    works = [Adding(0), Adding(1, fails=True), Adding(2)]
    assert asyncio.run(run_together(compute, works)) == [[0], ValueError, [2]]
    works = [Adding(0), Adding(1), Adding(2)]
    assert asyncio.run(run_together(compute, works, cancelled=0)) == [asyncio.CancelledError, [1, 2], [1, 2]]


def test_members_of_a_batch_are_charged_by_their_size(compute, monkeypatch):
    charged: dict[str, float] = {}
    monkeypatch.setattr(compute._queue, "charge", lambda ticket, seconds: charged.update({ticket.client: seconds}))
    asyncio.run(run_together(compute, [Adding(0), Adding(1, size=3)]))
    compute.stop(timeout=5)
    assert charged["c1"] == pytest.approx(3 * charged["c0"])


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
    compute = ComputeThread().start()

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
    assert not any(thread.is_alive() for thread in compute._threads)


class Brief(Adding):
    """Gives the thread that it ran on."""

    is_brief = True

    def __call__(self) -> list[int]:
        super().__call__()
        return [threading.get_ident()]


def test_brief_work_runs_on_the_callers_thread_while_nothing_else_runs(compute):
    async def main() -> list[int]:
        alone = await compute.run(Priority.DECODE, Brief(1))
        release = await hold(compute)
        beside = asyncio.create_task(compute.run(Priority.DECODE, Brief(2)))
        await asyncio.sleep(0)
        release()
        behind = await beside
        other = await compute.run(Priority.DECODE, threading.get_ident)
        assert behind.value == [other.value]
        return alone.value

    assert asyncio.run(main()) == [threading.get_ident()]


def test_an_exception_of_brief_work_reaches_its_caller(compute):
    async def main() -> None:
        with pytest.raises(ValueError, match="1 is wrong"):
            await compute.run(Priority.DECODE, Brief(1, fails=True))

    asyncio.run(main())


class Device:
    """Results that are there only when a test says so, as a GPU's are when its kernels have run."""

    def __init__(self) -> None:
        self.marks: list[threading.Event] = []

    def mark(self) -> Callable[[], None]:
        self.marks.append(threading.Event())
        return partial(self._wait, self.marks[-1])

    def _wait(self, there: threading.Event) -> None:
        if not there.wait(30):
            raise TimeoutError("no kernel of this device ran")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def launching(device) -> Iterator[ComputeThread]:
    thread = ComputeThread(device.mark).start()
    yield thread
    for there in device.marks:
        there.set()
    thread.stop(timeout=5)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_work_is_launched_while_the_results_of_one_before_are_awaited(device, launching):
    async def main() -> None:
        ran: list[int] = []
        tasks = [
            asyncio.create_task(launching.run(Priority.FORWARD, partial(ran.append, number))) for number in range(3)
        ]
        await until(lambda: len(device.marks) == 2)
        await asyncio.sleep(0.05)
        assert ran == [0, 1], "a third must wait until the first is there"
        assert not tasks[0].done()
        device.marks[0].set()
        await tasks[0]
        await until(lambda: len(device.marks) == 3)
        assert not tasks[1].done()
        device.marks[1].set()
        device.marks[2].set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_seconds_are_counted_until_results_are_there_and_once(device, launching, monkeypatch):
    charged: list[float] = []
    monkeypatch.setattr(launching._queue, "charge", lambda ticket, seconds: charged.append(seconds))

    async def main() -> list[float]:
        tasks = [asyncio.create_task(launching.run(Priority.FORWARD, lambda: None)) for _ in range(2)]
        began = time.perf_counter()
        await until(lambda: len(device.marks) == 2)
        await asyncio.sleep(0.1)
        device.marks[0].set()
        first = await tasks[0]
        device.marks[1].set()
        second = await tasks[1]
        took = time.perf_counter() - began
        assert first.computed >= 0.1
        assert first.computed + second.computed <= took
        return [first.computed, second.computed]

    assert asyncio.run(main()) == charged


def test_a_kernel_that_fails_reaches_its_caller_and_the_thread_goes_on():
    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    waits = iter([fail, lambda: None])
    launching = ComputeThread(lambda: next(waits)).start()

    async def main() -> int:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await asyncio.wait_for(launching.run(Priority.FORWARD, lambda: 1), 10)
        return (await asyncio.wait_for(launching.run(Priority.FORWARD, lambda: 2), 10)).value

    assert asyncio.run(main()) == 2
    launching.stop(timeout=5)
    assert not any(thread.is_alive() for thread in launching._threads)


def test_brief_work_waits_for_its_results_elsewhere_than_on_the_callers_thread(device, launching):
    async def main() -> list[int]:
        task = asyncio.create_task(launching.run(Priority.DECODE, Brief(1)))
        await until(lambda: len(device.marks) == 1)
        device.marks[0].set()
        return (await task).value

    assert asyncio.run(main()) != [threading.get_ident()]
