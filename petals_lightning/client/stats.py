"""What a client has moved and suffered so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TransferStats:
    """Counters of what went over the wire.

    Attributes:
        bytes_sent, bytes_received: on all streams, headers included.
        retries: parts of steps that were sent again after a failure.
        requests: forward and backward requests sent from here and answered.
        hedges: requests that were late and were answered by a second server first.
        audits: requests that were computed again elsewhere and compared.
        handovers: requests that servers handed over to each other, from the first to the last.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    retries: int = 0
    requests: int = 0
    hedges: int = 0
    audits: int = 0
    handovers: int = 0
