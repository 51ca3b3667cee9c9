"""Which servers of a route may hand a request over to each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import groupby

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.errors import PeerFailure, WrongResult
from petals_lightning.protocol.handover import STREAM_KEY_BYTES
from petals_lightning.protocol.messages import ErrorCode

logger = logging.getLogger(__name__)

_OF_UNKNOWN_ORIGIN = {
    code.value
    for code in (
        ErrorCode.NOT_HANDED_OVER,
        ErrorCode.GRAPH_LOST,
        ErrorCode.ADAPTER_LOST,
        ErrorCode.BAD_REQUEST,
        ErrorCode.INTERNAL,
    )
}
_AVOID_PERIOD, _MAX_AVOID_PERIOD = 30.0, 600.0


def may_be_anothers_fault(failure: PeerFailure) -> bool:
    """Whether a failure during a hand-over may be the fault of a server before, or of the hand-over itself.

    Asking the servers one by one then shows which one is at fault.
    """
    return failure.code in _OF_UNKNOWN_ORIGIN or isinstance(failure, WrongResult)


class HandoverPolicy:
    """Which servers may hand over to each other. Those that have failed to are asked one by one for a while."""

    def __init__(self, config: ClientConfig):
        # If a server could tell which requests are never audited, it could lie in those.
        self.is_on = config.server_to_server and config.audit_rate == 0
        self._avoided: dict[tuple[str, ...], tuple[float, float]] = {}  # end and length of each ban

    def group(self, connections: Sequence[ServerConnection | None]) -> list[int]:
        """The number of consecutive servers in each segment of a route along these connections."""
        if not self.is_on:
            return [1] * len(connections)
        sizes: list[int] = []
        for may_hand_over, members in groupby(connections, _may_hand_over):
            row = list(members)
            sizes += [len(row)] if may_hand_over and self.allows(row) else [1] * len(row)
        return sizes

    def allows(self, connections: Sequence[ServerConnection | None]) -> bool:
        """Whether a request may be handed over along all these servers."""
        if not self.is_on or len(connections) < 2 or not all(map(_may_hand_over, connections)):
            return False
        until, _ = self._avoided.get(tuple(c.peer for c in connections if c is not None), (0.0, 0.0))
        return time.monotonic() > until

    def avoid(self, peers: Sequence[str], why: object) -> None:
        """Has these servers asked one by one for a while, longer each time."""
        now = time.monotonic()
        until, period = self._avoided.get(tuple(peers), (0.0, 0.0))
        if until > now:
            return  # several requests in flight may report one cause
        self._avoided = {route: entry for route, entry in self._avoided.items() if entry[0] + entry[1] > now}
        period = min(2 * period, _MAX_AVOID_PERIOD) or _AVOID_PERIOD
        self._avoided[tuple(peers)] = now + period, period
        names = ", ".join(f"…{peer[-6:]}" for peer in peers)
        logger.info("servers %s do not hand over to each other for %.0f s: %s", names, period, why)


def _may_hand_over(connection: ServerConnection | None) -> bool:
    if connection is None or not connection.is_open:
        return False
    # Servers that offer only Petals' methods have no streams.
    stream, key = connection.info.get("stream"), connection.info.get("stream_key")
    return type(stream) is int and 0 <= stream < 1 << 63 and isinstance(key, bytes) and len(key) == STREAM_KEY_BYTES
