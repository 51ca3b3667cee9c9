"""Limits of one server. Requests are checked against them before they take memory or compute."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from petals_lightning.options import ABOVE_0, FINITE_ABOVE_0, FINITE_FROM_0, FROM_0, check_options, described, option

GIB = 1 << 30
_MANY_STREAMS = 1 << 14


@described
@dataclass(frozen=True)
class ServerLimits:
    """What one server grants its clients.

    The last part of each shared budget (`cache_bytes`, `max_total_bytes`, `max_streams`) is reserved for clients that
    hold least; see `room_for`.
    """

    graph_bytes: int = option(
        2 * GIB,
        "Memory for autograd graphs that wait for their backward, of all clients together (GiB on the command line).",
        FINITE_FROM_0,
        flag="--graph-memory",
        unit=GIB,
    )
    graph_lifetime: float = option(300.0, "Seconds that a kept graph waits for its backward.", FROM_0)
    cache_bytes: int = option(
        4 * GIB,
        "Memory for keys and values of inference sessions, of all clients together (GiB on the command line).",
        FINITE_FROM_0,
        flag="--cache-memory",
        unit=GIB,
    )
    cache_lifetime: float = option(1800.0, "Seconds that a session may be idle.", FROM_0)
    max_batch_tokens: int = option(1 << 16, "Largest batch × tokens of one request, prompts included.", FINITE_ABOVE_0)
    max_message_bytes: int = option(
        1 * GIB, "Bytes of one request's tensors, and of all requests being received on one stream.", ABOVE_0
    )
    max_open_requests: int = option(64, "Requests of one client that are not answered yet.", ABOVE_0)
    max_streams_per_client: int = option(8, "Streams of one client.", ABOVE_0)
    max_streams: int | None = option(
        None,
        "Streams of all clients together.",
        ABOVE_0,
        default_words="half of the file descriptors that the process may have",
    )
    max_sessions_per_client: int = option(256, "Inference sessions of one client.", FROM_0)
    max_client_bytes: int = option(
        2 * GIB,
        "Bytes of one client's requests and answers under way and of its adapters, all its streams together.",
        ABOVE_0,
    )
    max_total_bytes: int = option(8 * GIB, "The same of all clients together.", ABOVE_0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def all_streams(self) -> int:
        """`max_streams`, or a number that follows from the limits of the process."""
        if self.max_streams is not None:
            return self.max_streams
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return soft // 2 if soft != resource.RLIM_INFINITY else _MANY_STREAMS


def room_for(held: int, *, taken: int, budget: int) -> int:
    """How much more a client may take of a budget that all clients share.

    The last quarter is reserved for clients that hold little: it gives each at most one thirty-second of the budget.

    Args:
        held: by the client.
        taken: by all clients.
        budget: in all.
    """
    left = budget - taken
    return max(left - budget // 4, min(left, budget // 32 - held), 0)
