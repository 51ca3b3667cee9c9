"""Speeds of servers, measured by our own requests. No I/O."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

DEFAULT_HOP_SECONDS = 0.01


@dataclass
class SpeedEstimate:
    """The speed of one server; newer measurements weigh more.

    Attributes:
        hop_seconds: seconds to send a request and get its answer back, without the computing.
        tokens_per_second: of one block.
    """

    hop_seconds: float
    tokens_per_second: float
    count: int = 1

    def update(self, newest: SpeedEstimate) -> None:
        self.count += 1
        for name in ("hop_seconds", "tokens_per_second"):
            setattr(self, name, _mean(getattr(self, name), getattr(newest, name), self.count))


def _mean(mean: float, newest: float, count: int) -> float:
    """A plain mean at first, so that a cold first request is soon outweighed. Later, newer values weigh more."""
    return mean + max(1 / count, 0.2) * (newest - mean)


class SpeedEstimates:
    """The speeds that one client has measured.

    Attributes:
        by_peer: estimates by peer id.
    """

    def __init__(self) -> None:
        self.by_peer: dict[str, SpeedEstimate] = {}

    def report_success(self, peer: str, *, tokens: int, blocks: int, compute: float, elapsed: float) -> None:
        """Updates from an answered request: `elapsed` seconds here, of which `compute` seconds on the server."""
        newest = SpeedEstimate(max(elapsed - compute, 0.0), tokens * blocks / max(compute, 1e-6))
        if peer in self.by_peer:
            self.by_peer[peer].update(newest)
        else:
            self.by_peer[peer] = newest

    def report_slow(self, peer: str, *, tokens: int, blocks: int, elapsed: float) -> None:
        """Updates from a request that is unanswered after `elapsed` seconds of work: the server is no faster."""
        at_most = tokens * blocks / max(elapsed, 1e-6)
        speed = self.by_peer.setdefault(peer, SpeedEstimate(DEFAULT_HOP_SECONDS, at_most))
        speed.tokens_per_second = min(speed.tokens_per_second, at_most)

    def forget_absent(self, present: Container[str]) -> None:
        self.by_peer = {peer: speed for peer, speed in self.by_peer.items() if peer in present}
