"""How fast servers and the wire are, as our own requests have found them. No I/O."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

DEFAULT_HOP_SECONDS = 0.01


@dataclass
class Speed:
    """Of one server; newer measurements weigh more.

    Attributes:
        hop_seconds: to get a request there and its answer back.
        tokens_per_second: of one block.
        request_tokens: in a request, while this was measured.
    """

    hop_seconds: float
    tokens_per_second: float
    request_tokens: float
    count: int = 1

    def update(self, newest: Speed) -> None:
        self.count += 1
        for name in ("hop_seconds", "tokens_per_second", "request_tokens"):
            setattr(self, name, _mean(getattr(self, name), getattr(newest, name), self.count))


def _mean(mean: float, newest: float, count: int) -> float:
    """A plain mean at first, so that a cold first request is soon outweighed; then newer ones weigh more."""
    return mean + max(1 / count, 0.2) * (newest - mean)


class Paces:
    """What one client has measured.

    Attributes:
        speeds: of servers, by peer id.
        element_seconds: what one element of a tensor takes from one peer to the next, over all links as one.
    """

    def __init__(self) -> None:
        self.speeds: dict[str, Speed] = {}
        self.element_seconds, self._travels = 0.0, 0

    def report_success(self, peer: str, *, tokens: int, blocks: int, compute: float, elapsed: float) -> None:
        """Learns from an answered request: `elapsed` seconds here, of which `compute` seconds on the server."""
        newest = Speed(max(elapsed - compute, 0.0), tokens * blocks / max(compute, 1e-6), tokens)
        if peer in self.speeds:
            self.speeds[peer].update(newest)
        else:
            self.speeds[peer] = newest

    def report_slow(self, peer: str, *, tokens: int, blocks: int, elapsed: float) -> None:
        """Learns from a request that a server has not answered after `elapsed` seconds of work: it is no faster."""
        at_most = tokens * blocks / max(elapsed, 1e-6)
        speed = self.speeds.setdefault(peer, Speed(DEFAULT_HOP_SECONDS, at_most, tokens))
        speed.tokens_per_second = min(speed.tokens_per_second, at_most)

    def report_travel(self, *, seconds: float, num_elements: int) -> None:
        """Learns from a request that found the wire free.

        Args:
            seconds: for which it was on its way, in no server's queue or compute, beyond what a ping takes.
            num_elements: of tensors, moved from one peer to the next, all trips together.
        """
        self._travels += 1
        newest = max(seconds, 0.0) / max(num_elements, 1)
        self.element_seconds = _mean(self.element_seconds, newest, self._travels)

    def forget_absent(self, present: Container[str]) -> None:
        self.speeds = {peer: speed for peer, speed in self.speeds.items() if peer in present}
