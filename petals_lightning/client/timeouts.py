"""Time limits of requests, from what earlier requests took. Pure, except that the clock reads the time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from petals_lightning.client.config import ClientConfig

BACKWARD_COST = 2.0  # times a forward's


STALLED_QUEUE_TIMEOUT = 15.0  # seconds in a queue that does not advance, before other servers are asked too
MAX_QUEUE_TIME = 4.0  # times `request_timeout`: the longest total wait, while the place in the queue improves


class ServiceTimer:
    """Seconds that a server has worked on a request, as far as the client knows.

    The clock restarts when the request has been sent, and whenever the server reports that it still waits in the queue.
    A server that always reports so is not waited for forever: `stalled` counts on while the place does not improve.

    Attributes:
        asked_at: when the request had been sent.
    """

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()
        self._began()

    def _began(self) -> None:
        self.asked_at = self._improved_at = time.monotonic()
        self._ahead: float = math.inf

    def restart(self) -> None:
        self._since = time.monotonic()
        self._began()

    def queue(self, ahead: int) -> None:
        """Notes the number of requests ahead of this one in the server's queue."""
        self._since = time.monotonic()
        if ahead < self._ahead:
            self._ahead, self._improved_at = ahead, self._since

    def pause(self) -> None:
        """Stops at 0 until it is restarted: the request waits on this machine for its turn to be sent."""
        self._since = None

    @property
    def is_paused(self) -> bool:
        return self._since is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since if self._since is not None else 0.0

    @property
    def late(self) -> float:
        """Seconds of work, or of a long wait in a queue that does not advance."""
        return max(self.seconds, self.stalled - STALLED_QUEUE_TIMEOUT)

    @property
    def stalled(self) -> float:
        """Seconds since the request was sent, or since its place in the server's queue last improved."""
        return time.monotonic() - self._improved_at if self._since is not None else 0.0

    @property
    def lost(self) -> float:
        """Seconds that this server cost before another one answered: of work, or in a queue that did not advance.

        A wait in a queue that advances is not counted.
        """
        return max(self.seconds, self.stalled if self.stalled > STALLED_QUEUE_TIMEOUT else 0.0)

    def overdue(self, deadline: float, request_timeout: float) -> str | None:
        """Why the request is given up; None while it is not.

        Args:
            deadline: seconds of work.
            request_timeout: see `ClientConfig`.
        """
        if self.seconds > deadline:
            return f"no answer after {self.seconds:.0f} s of work on a request"
        if self.stalled > deadline + request_timeout:
            return f"a request has been in its queue for {self.stalled:.0f} s without coming nearer"
        waited = time.monotonic() - self.asked_at
        if self._since is not None and waited > MAX_QUEUE_TIME * request_timeout:
            return f"a request has been in its queue for {waited:.0f} s"
        return None


@dataclass(frozen=True)
class RequestTimeouts:
    """Seconds of work after which a request is given up (`deadline`), or also tried elsewhere (`hedge`, or never)."""

    deadline: float
    hedge: float | None


def request_timeouts(expected: float, is_measured: bool, config: ClientConfig) -> RequestTimeouts:
    """Deadline and hedge of a request that should take `expected` seconds.

    `is_measured`: the estimate comes from our own requests. A server's own claim is enough to hedge, but not to give
    up: its first request may have to warm the device up.
    """
    deadline = config.request_timeout
    if is_measured:
        floor = min(config.min_request_timeout, config.request_timeout)
        deadline = min(max(config.deadline_factor * expected, floor), config.request_timeout)
    if config.hedge_factor is None or math.isinf(config.hedge_factor):
        return RequestTimeouts(deadline, None)
    # No hedge before the server has been asked once for the request's place in its queue.
    return RequestTimeouts(deadline, max(config.hedge_factor * expected, 2 * config.heartbeat_period))
