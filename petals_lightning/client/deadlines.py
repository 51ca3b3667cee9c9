"""How long a request may take, from what requests have taken. Pure but for the clock's reading of time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from petals_lightning.client.config import ClientConfig

BACKWARD_COST = 2.0  # times a forward's


class ServiceClock:
    """Seconds for which a server has been at work on a request, as far as the client knows.

    It starts again when the request is on its way, and whenever the server says that it still waits in the queue.
    """

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()

    def restart(self) -> None:
        self._since = time.monotonic()

    def hold(self) -> None:
        """Stands at 0 until it is restarted: the request waits here, for its turn to be sent."""
        self._since = None

    @property
    def is_held(self) -> bool:
        return self._since is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since if self._since is not None else 0.0


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
