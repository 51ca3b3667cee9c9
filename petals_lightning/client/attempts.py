"""What a failure in a step means: for the server, for the request, for the step."""

from __future__ import annotations

import time
from collections import Counter

from petals_lightning.client.router import Router
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import PeerFailure, RemoteRequestError, RetriesExhaustedError
from petals_lightning.protocol.messages import ErrorCode

_BAD, _FAILED = ErrorCode.BAD_REQUEST.value, ErrorCode.INTERNAL.value


class Attempts:
    """The failures of one part of a step, in one direction.

    A failed server is banned for a while and another one is asked. This holds even where the server reports a bad
    request or a failed computation. Such a report is believed, and raised, only if no other server holds the blocks,
    or if a second server has reported a bad request too.

    Attributes:
        not_finite: peers whose answers were not finite.
        lost: peers that had lost something of a session, and the error code that says what.
    """

    def __init__(self, servers: ServerPool, router: Router, stats: TransferStats):
        self.not_finite: set[str] = set()
        self.lost: set[tuple[str, str]] = set()
        self._servers, self._router, self._stats = servers, router, stats
        self._failures: list[PeerFailure] = []
        self._began = time.monotonic()

    def failed(self, failure: PeerFailure, start: int, end: int) -> None:
        """Bans a server that failed at blocks [start, end). Returns if the blocks should be tried again.

        Raises:
            RemoteRequestError: the request itself is wrong.
            RetriesExhaustedError: there were too many failures.
        """
        self._servers.report_failure(failure)
        before = [other for other in self._failures if other.code == failure.code]
        if failure.code in (_BAD, _FAILED) and self._is_believed(failure, before, start, end):
            for each in (*before, failure):
                self._servers.forgive(each.peer)
            raise RemoteRequestError(f"server …{failure.peer[-6:]} says: {failure.reason}") from failure
        self.count(failure)

    def count(self, failure: PeerFailure) -> None:
        """Counts a failure that a retry at the same server may fix.

        Raises:
            RetriesExhaustedError: one server failed more than `max_retries` times, or all servers together failed for
                longer than `recovery_timeout`.
        """
        self._failures.append(failure)
        self._stats.retries += 1
        config, of_one = self._servers.config, Counter(each.peer for each in self._failures)[failure.peer]
        seconds = time.monotonic() - self._began
        too_long = len(self._failures) > config.max_retries and seconds > config.recovery_timeout
        if of_one > config.max_retries or too_long:
            raise RetriesExhaustedError(
                f"a part of the step failed {len(self._failures)} times in {seconds:.0f} s "
                f"(max_retries={config.max_retries}); last: {'; '.join(str(each) for each in self._failures[-3:])}"
            ) from failure

    def _is_believed(self, failure: PeerFailure, before: list[PeerFailure], start: int, end: int) -> bool:
        said_so = {each.peer for each in before}
        if failure.code == _BAD and (
            said_so - {failure.peer} or not self._router.others_hold(start, end, failure.peer)
        ):
            return True
        others = self._router.other_route(start, end, tokens=1, avoid=[failure.peer])
        return failure.peer in said_so and others is None  # may have been an accident, so it is asked twice
