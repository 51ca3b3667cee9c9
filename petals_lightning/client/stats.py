"""Counters of a client's traffic and failures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TransferStats:
    """Counters of what went over the wire.

    Attributes:
        bytes_sent, bytes_received: on all streams, including headers.
        retries: parts of steps that were sent again after a failure.
        requests: forward and backward requests that were sent from here and answered.
        hedges: late requests that a second server answered first.
        audits: requests that were computed again elsewhere and compared.
        handovers: requests that servers handed over to each other, along the whole segment.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    retries: int = 0
    requests: int = 0
    hedges: int = 0
    audits: int = 0
    handovers: int = 0
