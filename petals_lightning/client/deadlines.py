"""How long a request may take, from what requests have taken. Pure but for the clock's reading of time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from petals_lightning.client.config import ClientConfig

BACKWARD_COST = 2.0  # times a forward's


QUEUE_PATIENCE = 15.0  # seconds in a queue that does not move, before others are asked too
MAX_QUEUE_TIME = 4.0  # times `request_timeout`: what a request may wait in all while its place in the queue improves


class ServiceClock:
    """Seconds for which a server has been at work on a request, as far as the client knows.

    It starts again when the request is on its way, and whenever the server says that it still waits in the queue. A
    server that only says so is not waited for: `stalled` counts on while the place in the queue does not improve.

    Attributes:
        asked_at: when the request was on its way.
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
        """The server says that so many requests are in front of this one."""
        self._since = time.monotonic()
        if ahead < self._ahead:
            self._ahead, self._improved_at = ahead, self._since

    def hold(self) -> None:
        """Stands at 0 until it is restarted: the request waits here, for its turn to be sent."""
        self._since = None

    @property
    def is_held(self) -> bool:
        return self._since is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since if self._since is not None else 0.0

    @property
    def late(self) -> float:
        """Seconds of work; a long wait in a queue that does not move counts, too."""
        return max(self.seconds, self.stalled - QUEUE_PATIENCE)

    @property
    def stalled(self) -> float:
        """Seconds since the request was on its way, or its place in the server's queue last improved."""
        return time.monotonic() - self._improved_at if self._since is not None else 0.0

    @property
    def lost(self) -> float:
        """Seconds that this server has cost, once another one was quicker: of work, or in a queue that did not move.

        A wait in a queue that moves is not held against a server.
        """
        return max(self.seconds, self.stalled if self.stalled > QUEUE_PATIENCE else 0.0)

    def overdue(self, deadline: float, request_timeout: float) -> str | None:
        """Why the request is given up; None while it is waited for.

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
class Patience:
    """Seconds of service after which a request is given up (`deadline`), or tried elsewhere too (`hedge`, or never)."""

    deadline: float
    hedge: float | None


def patience(expected: float, is_measured: bool, config: ClientConfig) -> Patience:
    """Deadline and hedge of a request that should take `expected` seconds.

    `is_measured`: that comes from our own requests. What a server says of itself suffices to hedge, but not to give a
    request up: its first one may have to warm the device up.
    """
    deadline = config.request_timeout
    if is_measured:
        floor = min(config.min_request_timeout, config.request_timeout)
        deadline = min(max(config.deadline_factor * expected, floor), config.request_timeout)
    if config.hedge_factor is None:
        return Patience(deadline, None)
    # Not before the server has been asked once where the request stands.
    return Patience(deadline, max(config.hedge_factor * expected, 2 * config.heartbeat_period))
