"""What one server grants: budgets that requests are checked against before memory or compute is spent."""

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
        max_message_bytes: bytes of one request's tensors, and of all requests under way on one stream.
        max_open_requests: requests of one client that may wait, run or be on their way back at once.
        max_streams_per_client: streams of one client.
        max_streams: streams of all clients together; None takes half of the file descriptors that the process may have.
        max_sessions_per_client: inference sessions of one client.
        max_client_bytes: bytes of one client's requests and answers under way and of its registered prompts, all its
            streams together.
        max_total_bytes: the same of all clients together.

    Of what clients share (`cache_bytes`, `max_total_bytes`, `max_streams`) the last part is kept for those who hold
    least, see `room_for`.
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
        """`max_streams`, or what follows from the process."""
        if self.max_streams is not None:
            return self.max_streams
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return soft // 2 if soft != resource.RLIM_INFINITY else _MANY_STREAMS


def room_for(held: int, *, taken: int, budget: int) -> int:
    """How much more a client may take of what all clients share.

    The last quarter is kept for those who hold little: nobody gets more than a thirty-second of the budget out of it.

    Args:
        held: what the client has.
        taken: what all clients have.
        budget: all there is.
    """
    left = budget - taken
    return max(left - budget // 4, min(left, budget // 32 - held), 0)
