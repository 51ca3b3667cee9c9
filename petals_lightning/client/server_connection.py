"""What the client asks of a connection to a server, whatever the server speaks."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from petals_lightning.client.deadlines import ServiceClock
from petals_lightning.protocol.messages import Message


class ServerConnection(Protocol):
    """Answers our messages (forward, backward, step); all methods belong to the node's loop.

    Attributes:
        peer: the server's base58 id.
        info: what it says of itself; `hidden_size` and `max_batch_tokens` (B·(P + S) of one request) at least.
        round_trip: seconds of a call that computes nothing.
        cuts_steps: it takes steps of a session of any length; else of `max_batch_tokens`.
    """

    peer: str
    info: dict[str, Any]
    round_trip: float | None
    cuts_steps: bool

    @property
    def is_open(self) -> bool: ...

    @property
    def silence(self) -> float:
        """Seconds for which a ping has been without answer; 0 while the server shows that it lives."""

    async def call(
        self,
        message: Message,
        call_id: int | None = None,
        *,
        deadline: float | None = None,
        clock: ServiceClock | None = None,
    ) -> Message:
        """Sends a request and waits for its reply.

        Args:
            message: the request.
            call_id: from `next_id`, if the caller refers to the call later.
            deadline: seconds for which the server may work on it; None takes `request_timeout`.
            clock: where to count them, for a caller that looks at it too.

        Raises:
            PeerFailure: the connection or the server failed, or the server refuses.
        """

    def next_id(self) -> int:
        """A fresh call id, for callers that refer to the call later."""

    async def register_prompts(self, version: int, start: int, deep: torch.Tensor) -> int:
        """Makes sure that the server has deep prompts before the requests that name them.

        Args:
            version: changes when their values do.
            start: their first block.
            deep: [n, P, H], of n blocks.

        Returns:
            The key under which requests on this connection name them.

        Raises:
            PeerFailure: the connection has failed.
        """

    def forget_prompts(self) -> None:
        """The server has dropped registered prompts: they are sent again when next needed."""

    def tell(self, message: Message, call_id: int = 0) -> None:
        """Sends what needs no answer; does nothing on a lost connection."""

    def close(self) -> None: ...
