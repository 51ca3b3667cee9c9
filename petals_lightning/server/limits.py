"""What one server grants: budgets that requests are checked against before memory or compute is spent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Args:
    graph_bytes: budget for kept autograd graphs, all clients together.
    graph_lifetime: seconds that a kept graph waits for its backward.
    cache_bytes: budget for keys and values of inference sessions, all clients together.
    cache_lifetime: seconds that a session may be idle.
    max_batch_tokens: B·(P + S) of one request.
    max_message_bytes: bytes of one request's tensors, and of all requests under way on one stream.
    max_open_requests: requests of one client that may wait, run or be on their way back at once.
    max_streams_per_client: streams of one client.
    max_client_bytes: bytes of one client's requests that are not yet answered, all its streams together.
    max_total_bytes: the same of all clients together.
    """

    graph_bytes: int = 2 << 30
    graph_lifetime: float = 300.0
    cache_bytes: int = 4 << 30
    cache_lifetime: float = 1800.0
    max_batch_tokens: int = 1 << 16
    max_message_bytes: int = 1 << 30
    max_open_requests: int = 64
    max_streams_per_client: int = 8
    max_client_bytes: int = 2 << 30
    max_total_bytes: int = 8 << 30
