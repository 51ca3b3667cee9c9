"""Limits of one server. Requests are checked against them before they take memory or compute."""

from __future__ import annotations

import resource
from dataclasses import dataclass

_MANY_STREAMS = 1 << 14


@dataclass(frozen=True)
class ServerLimits:
    """What one server grants its clients.

    Args:
        graph_bytes: budget for kept autograd graphs, all clients together.
        graph_lifetime: seconds that a kept graph waits for its backward.
        cache_bytes: budget for keys and values of inference sessions, all clients together.
        cache_lifetime: seconds that a session may be idle.
        max_batch_tokens: B·(P + S) of one request.
        max_message_bytes: bytes of one request's tensors, and of all requests being received on one stream.
        max_open_requests: requests of one client that are not answered yet.
        max_streams_per_client: streams of one client.
        max_streams: streams of all clients together; None: half of the process's limit of file descriptors.
        max_sessions_per_client: inference sessions of one client.
        max_client_bytes: bytes of one client's open requests, their answers and registered prompts, on all its streams.
        max_total_bytes: the same for all clients together.

    The last part of each shared budget (`cache_bytes`, `max_total_bytes`, `max_streams`) is reserved for clients that
    hold least; see `room_for`.
    """

    graph_bytes: int = 2 << 30
    graph_lifetime: float = 300.0
    cache_bytes: int = 4 << 30
    cache_lifetime: float = 1800.0
    max_batch_tokens: int = 1 << 16
    max_message_bytes: int = 1 << 30
    max_open_requests: int = 64
    max_streams_per_client: int = 8
    max_streams: int | None = None
    max_sessions_per_client: int = 256
    max_client_bytes: int = 2 << 30
    max_total_bytes: int = 8 << 30

    @property
    def all_streams(self) -> int:
        """`max_streams`, or the limit that follows from file descriptors."""
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
