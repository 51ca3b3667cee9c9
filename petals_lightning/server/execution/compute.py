"""The compute thread. Requests wait for it in a queue that is fair between clients.

While the thread is idle, work of a few milliseconds runs on the event loop's own thread. On a GPU, work only launches
kernels: a second thread waits for their results, while the compute thread launches the next request.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, Self, TypeVar

from petals_lightning.heap import HeapTrimmer
from petals_lightning.server.execution.fair_queue import LONG_STEP, SHORT_STEP, FairQueue, Ticket

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Priority(IntEnum):
    """Order of the requests of one client, lowest first. `FairQueue` decides between clients."""

    DECODE = SHORT_STEP
    BACKWARD = 1  # frees a kept graph, so it goes before new forwards
    FORWARD = 2
    PREFILL = LONG_STEP  # a session step of many positions, which takes its turn


@dataclass
class ComputeResult(Generic[T]):
    """What work returned, the seconds that it waited in the queue, and the seconds that it took."""

    value: T
    queued: float
    computed: float


@dataclass
class Usage:
    """What has run so far, by kind of work: its number, the seconds that it waited in the queue, and that it took."""

    requests: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))
    queued: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))
    computed: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.0))

    def add(self, priority: Priority, result: ComputeResult[Any]) -> None:
        self.requests[priority] += 1
        self.queued[priority] += result.queued
        self.computed[priority] += result.computed


class Batchable(ABC, Generic[T]):
    """Work that can run as one batch with other work of its kind. The compute thread calls its methods.

    Attributes:
        size: weight by which a batch's compute time is split among its members.
        is_brief: short enough that switching threads would dominate its run time, and unlikely to be batched.
    """

    size: int
    is_brief: bool = False

    @abstractmethod
    def __call__(self) -> T:
        """Runs it by itself; also after a batch that it was part of has failed."""

    @abstractmethod
    def can_batch(self, others: Sequence[Batchable[T]]) -> bool:
        """Whether it can join a batch of these. If there are none: whether it can be in any batch."""

    @abstractmethod
    def run_batch(self, others: Sequence[Batchable[T]]) -> list[T]:
        """Runs itself and others as one batch. Returns all results in order, its own first."""


@dataclass(eq=False)
class _Job(Generic[T]):
    """Work in the queue, and the future that its caller awaits."""

    work: Callable[[], T]
    result: asyncio.Future[ComputeResult[T]]
    loop: asyncio.AbstractEventLoop
    arrived: float

    @property
    def size(self) -> int:
        return self.work.size if isinstance(self.work, Batchable) else 1

    def run(self) -> _Outcome[T]:
        """Runs the work by itself."""
        try:
            return _Outcome(self, self.work())
        except BaseException as e:
            return _Outcome(self, error=e)


@dataclass
class _Outcome(Generic[T]):
    """What a job's work returned, or raised."""

    job: _Job[T]
    value: T | None = None
    error: BaseException | None = None

    def settle(self, began: float, ended: float) -> None:
        """Resolves the caller's future."""
        job, result = self.job, ComputeResult(self.value, max(began - self.job.arrived, 0.0), ended - began)
        if not job.loop.is_closed():  # a server that stopped without waiting for this job has closed it
            job.loop.call_soon_threadsafe(_set, job.result, result, self.error)


@dataclass
class _Launch:
    """Jobs that have run as one batch, or a single job; `wait` returns when their results are there."""

    outcomes: list[_Outcome[Any]]
    shares: list[tuple[Ticket[_Job[Any]], int]]  # of the batch's seconds, by size
    began: float
    wait: Callable[[], None] | None


class ComputeThread:
    """Runs functions one after another. torch releases the interpreter lock, so the event loop keeps running.

    Args:
        mark: for devices where functions return before their results are there, such as GPUs (`Transfers.mark`). It is
            called after each function, and returns a callable that waits for the results.
        depth: how many functions can then run at a time: one is launched while one computes on each device.

    Attributes:
        usage: of all work that has run.
    """

    def __init__(self, mark: Callable[[], Callable[[], None]] | None = None, depth: int = 2) -> None:
        self.usage = Usage()
        self._queue: FairQueue[_Job[Any]] = FairQueue()
        self._changed = threading.Condition()
        self._stopping = False
        self._mark, self._depth = mark, depth if mark is not None else 1
        self._running, self._ended = 0, 0.0
        self._launches: queue.Queue[_Launch | None] = queue.Queue()
        self._heap = HeapTrimmer()
        self._threads = [threading.Thread(target=self._work, name="compute", daemon=True)]
        if mark is not None:
            self._threads.append(threading.Thread(target=self._wait_for_results, name="results", daemon=True))

    def start(self) -> Self:
        """Starts the thread."""
        for thread in self._threads:
            thread.start()
        return self

    def ahead(self, key: Hashable) -> int:
        """About how many requests run before the one named `key`; 0 if it is running or done."""
        with self._changed:
            position = self._queue.ahead(key)
        return 0 if position is None else position + 1  # one is running

    async def run(
        self, priority: Priority, work: Callable[[], T], *, client: str = "", key: Hashable = None
    ) -> ComputeResult[T]:
        """Runs `work` when its turn comes. If the caller is cancelled before that, it never runs.

        Brief work runs at once, on the caller's thread, if nothing else runs or waits. The event loop blocks meanwhile.

        Args:
            priority: among the requests of one client.
            work: a `Batchable` runs together with those that wait at that moment and fit; it never waits for others.
            client: who is charged for the compute time.
            key: names the request for `ahead`.
        """
        if isinstance(work, Batchable) and work.is_brief and self._mark is None and self._is_idle():
            started = time.perf_counter()  # nothing else starts: only this thread puts work into the queue
            brief = ComputeResult(work(), 0.0, time.perf_counter() - started)
            self.usage.add(priority, brief)
            self._heap.trim()
            return brief
        loop = asyncio.get_running_loop()
        result: asyncio.Future[ComputeResult[T]] = loop.create_future()
        job = _Job(work, result, loop, time.perf_counter())
        with self._changed:
            ticket = self._queue.put(client, priority, job, key)
            self._changed.notify()
        try:
            done = await result
        except asyncio.CancelledError:
            with self._changed:
                self._queue.discard(ticket)  # and frees the request's tensors
            raise
        self.usage.add(priority, done)
        return done

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the current work; waits for that up to `timeout` seconds.

        Work in the queue never runs; its callers must be cancelled.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    def _is_idle(self) -> bool:
        with self._changed:
            return not (self._running or self._stopping or len(self._queue))

    def _work(self) -> None:
        while self._run_next():
            self._heap.trim()
        self._launches.put(None)

    def _run_next(self) -> bool:
        """Runs the next job, or the next batch of jobs; False after `stop`.

        A method of its own, so that its references end when it returns: otherwise an idle thread would keep the last
        request's tensors.
        """
        with self._changed:
            while not self._stopping:
                if self._running == self._depth or not len(self._queue):
                    self._changed.wait()
                elif (seconds := self._queue.hold()) > 0:
                    self._changed.wait(seconds)
                else:
                    break
            if self._stopping:
                return False
            first = self._queue.pop()
            assert first is not None
            tickets = [first, *self._pop_batch(first.item)]
            self._running += 1
        began = time.perf_counter()
        outcomes = _run([ticket.item for ticket in tickets])
        launch = _Launch(outcomes, [(ticket, ticket.item.size) for ticket in tickets], began, None)
        if self._mark is None:
            self._finish(launch)
        else:
            try:
                launch.wait = self._mark()
            except BaseException as e:  # a GPU reports an earlier failure at any later call
                _fail(launch, e)
            self._launches.put(launch)
        return True

    def _wait_for_results(self) -> None:
        while (launch := self._launches.get()) is not None:
            try:
                if launch.wait is not None:
                    launch.wait()
            except BaseException as e:
                _fail(launch, e)
            self._finish(launch)
            del launch

    def _finish(self, launch: _Launch) -> None:
        ended = time.perf_counter()
        began, self._ended = max(launch.began, self._ended), ended  # two launches are computed one after the other
        size = sum(size for _, size in launch.shares)
        with self._changed:
            self._running -= 1
            for ticket, own in launch.shares:
                self._queue.charge(ticket, (ended - began) * own / size)
            self._changed.notify()
        for outcome in launch.outcomes:  # last, so that the thread is idle when a caller submits its next request
            outcome.settle(began, ended)

    def _pop_batch(self, job: _Job[Any]) -> list[Ticket[_Job[Any]]]:
        """Takes the jobs that wait and can run as one batch with `job`."""
        if not len(self._queue) or not isinstance(job.work, Batchable) or not job.work.can_batch([]):
            return []
        chosen = [job.work]

        def fits(other: _Job[Any]) -> bool:
            if not isinstance(other.work, Batchable) or not other.work.can_batch(chosen):
                return False
            chosen.append(other.work)
            return True

        return self._queue.pop_batch(fits)


def _run(jobs: list[_Job[Any]]) -> list[_Outcome[Any]]:
    """Runs jobs as one batch; one by one if that fails, so that an error reaches only its own caller."""
    jobs = [job for job in jobs if not job.result.cancelled()]
    if len(jobs) > 1 and isinstance(first := jobs[0].work, Batchable):
        try:
            values = first.run_batch([job.work for job in jobs[1:] if isinstance(job.work, Batchable)])
        except BaseException as e:
            logger.warning("%d requests failed as one batch; running them one by one", len(jobs), exc_info=e)
        else:
            return [_Outcome(job, value) for job, value in zip(jobs, values, strict=True)]
    return [job.run() for job in jobs if not job.result.cancelled()]


def _fail(launch: _Launch, error: BaseException) -> None:
    for outcome in launch.outcomes:
        outcome.error = outcome.error or error


def _set(future: asyncio.Future[Any], value: ComputeResult[Any], error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
