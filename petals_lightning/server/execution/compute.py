"""The one thread that computes. Requests wait in a queue that is fair between clients.

While it is idle, work of milliseconds runs on the event loop's own thread. On a GPU, work only launches kernels: a
second thread waits for their results, and the next request is launched meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

from petals_lightning.server.execution.fair_queue import LONG_STEP, SHORT_STEP, FairQueue, Ticket
from petals_lightning.server.execution.malloc_trim import HeapTrimmer

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Priority(IntEnum):
    """Lower runs first among the requests of one client; of several clients, see `FairQueue`."""

    DECODE = SHORT_STEP
    BACKWARD = 1  # frees a kept graph, so it goes before new forwards
    FORWARD = 2
    PREFILL = LONG_STEP  # a step of a session, of so many positions that it takes its turn


@dataclass
class Timed(Generic[T]):
    """A result with the seconds it waited and the seconds it took."""

    value: T
    queued: float
    computed: float


class JointWork(ABC, Generic[T]):
    """Work that can run as one batch with its like. Its methods are called by the compute thread only.

    Attributes:
        size: weight by which a batch's compute time is split among its members.
        is_brief: it takes so short that waking the compute thread and being woken by it would be a good part of that,
            and nothing is likely to join it.
    """

    size: int
    is_brief: bool = False

    @abstractmethod
    def __call__(self) -> T:
        """Runs it alone, also after a batch that it was in has failed."""

    @abstractmethod
    def joins(self, others: Sequence[JointWork[T]]) -> bool:
        """Whether it can run with these, which can run together; with none: whether it can run with any."""

    @abstractmethod
    def run_with(self, others: Sequence[JointWork[T]]) -> list[T]:
        """Runs all as one batch; results in order, its own first."""


@dataclass(eq=False)
class _Job(Generic[T]):
    """Work that waits, and who waits for it."""

    work: Callable[[], T]
    result: asyncio.Future[Timed[T]]
    loop: asyncio.AbstractEventLoop
    arrived: float

    @property
    def size(self) -> int:
        return self.work.size if isinstance(self.work, JointWork) else 1

    def run(self) -> _Outcome[T]:
        """Runs it alone."""
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
        """Hands it to who waits for it."""
        job, timed = self.job, Timed(self.value, max(began - self.job.arrived, 0.0), ended - began)
        if not job.loop.is_closed():  # it is where the server has stopped without waiting for this
            job.loop.call_soon_threadsafe(_set, job.result, timed, self.error)


@dataclass
class _Launch:
    """Jobs that have run, as one batch or one job alone; `wait` returns when their results are there."""

    outcomes: list[_Outcome[Any]]
    shares: list[tuple[Ticket[_Job[Any]], int]]  # of the seconds they take go with the size
    began: float
    wait: Callable[[], None] | None


class ComputeThread:
    """Runs functions one after another; torch releases the interpreter lock, so the event loop goes on.

    Args:
        mark: where functions return before their results are there, as with a GPU: called after each, returns what
            waits for them (`Transfers.mark`). Up to two functions are then under way.
    """

    def __init__(self, mark: Callable[[], Callable[[], None]] | None = None) -> None:
        self._queue: FairQueue[_Job[Any]] = FairQueue()
        self._changed = threading.Condition()
        self._stopping = False
        self._mark = mark
        self._under_way, self._ended = 0, 0.0
        self._launches: queue.Queue[_Launch | None] = queue.Queue()
        self._heap = HeapTrimmer()
        self._threads = [threading.Thread(target=self._work, name="compute", daemon=True)]
        if mark is not None:
            self._threads.append(threading.Thread(target=self._wait_for_results, name="results", daemon=True))
        for thread in self._threads:
            thread.start()

    def ahead(self, key: Hashable) -> int:
        """About how many requests run before the one under `key`; 0 if it runs already or is done."""
        with self._changed:
            position = self._queue.ahead(key)
        return 0 if position is None else position + 1  # one is running

    async def run(
        self, priority: Priority, work: Callable[[], T], *, client: str = "", key: Hashable = None
    ) -> Timed[T]:
        """Runs `work` when its turn comes; if the caller is cancelled before that, it never runs.

        Brief work runs here and now if nothing runs or waits; the event loop stands still meanwhile.

        Args:
            priority: among the requests of one client.
            work: a JointWork takes with it what waits at that moment and joins it; it never waits for company.
            client: whose share of the compute this counts on.
            key: names the request for `ahead`.
        """
        if isinstance(work, JointWork) and work.is_brief and self._mark is None and self._is_idle():
            started = time.perf_counter()  # nothing begins beside it: what is put into the queue comes from this thread
            timed = Timed(work(), 0.0, time.perf_counter() - started)
            self._heap.trim()
            return timed
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Timed[T]] = loop.create_future()
        job = _Job(work, result, loop, time.perf_counter())
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
            self._changed.notify_all()
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    def _is_idle(self) -> bool:
        with self._changed:
            return not (self._under_way or self._stopping or len(self._queue))

    def _work(self) -> None:
        while self._run_next():
            self._heap.trim()
        self._launches.put(None)

    def _run_next(self) -> bool:
        """Runs the next job, or the next batch of jobs; False after `stop`.

        A method of its own, so that its references are gone when it returns: an idle thread would hold the last
        request's tensors.
        """
        with self._changed:
            while not self._stopping:
                if self._under_way == (1 if self._mark is None else 2) or not len(self._queue):
                    self._changed.wait()
                elif (seconds := self._queue.hold()) > 0:
                    self._changed.wait(seconds)
                else:
                    break
            if self._stopping:
                return False
            first = self._queue.pop()
            assert first is not None
            tickets = [first, *self._company(first.item)]
            self._under_way += 1
        began = time.perf_counter()
        outcomes = _run([ticket.item for ticket in tickets])
        launch = _Launch(outcomes, [(ticket, ticket.item.size) for ticket in tickets], began, None)
        if self._mark is None:
            self._finish(launch)
        else:
            try:
                launch.wait = self._mark()
            except BaseException as e:  # a GPU says at any call that an earlier one failed
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
        began, self._ended = max(launch.began, self._ended), ended  # of two launched, one is computed after the other
        size = sum(size for _, size in launch.shares)
        with self._changed:
            self._under_way -= 1
            for ticket, own in launch.shares:
                self._queue.charge(ticket, (ended - began) * own / size)
            self._changed.notify()
        for outcome in launch.outcomes:  # last: the thread is idle by the time a caller submits its next request
            outcome.settle(began, ended)

    def _company(self, job: _Job[Any]) -> list[Ticket[_Job[Any]]]:
        """What waits and can run with a job."""
        if not len(self._queue) or not isinstance(job.work, JointWork) or not job.work.joins([]):
            return []
        chosen = [job.work]

        def joins(other: _Job[Any]) -> bool:
            if not isinstance(other.work, JointWork) or not other.work.joins(chosen):
                return False
            chosen.append(other.work)
            return True

        return self._queue.pop_company(joins)


def _run(jobs: list[_Job[Any]]) -> list[_Outcome[Any]]:
    """Runs jobs that join, as one batch; each alone if that fails, so that nobody pays for another's error."""
    jobs = [job for job in jobs if not job.result.cancelled()]
    if len(jobs) > 1 and isinstance(first := jobs[0].work, JointWork):
        try:
            values = first.run_with([job.work for job in jobs[1:] if isinstance(job.work, JointWork)])
        except BaseException as e:
            logger.warning("%d requests failed as one batch; each is run alone", len(jobs), exc_info=e)
        else:
            return [_Outcome(job, value) for job, value in zip(jobs, values, strict=True)]
    return [job.run() for job in jobs if not job.result.cancelled()]


def _fail(launch: _Launch, error: BaseException) -> None:
    for outcome in launch.outcomes:
        outcome.error = outcome.error or error


def _set(future: asyncio.Future[Any], value: Timed[Any], error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
