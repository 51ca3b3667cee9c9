"""The client's interface to a server, whichever protocol the server speaks."""

from __future__ import annotations

from typing import Any, Protocol

from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import Message


class ServerConnection(Protocol):
    """Sends our messages (forward, backward, step) to one server. All methods belong to the node's loop.

    Attributes:
        peer: the server's base58 id.
        info: the server's own description, with at least `hidden_size` and `max_batch_tokens` (B·(P + S) of one
            request).
        round_trip: seconds of a call that computes nothing.
        cuts_steps: the server takes session steps of any length; otherwise of up to `max_batch_tokens`.
    """

    peer: str
    info: dict[str, Any]
    round_trip: float | None
    cuts_steps: bool

    @property
    def is_open(self) -> bool: ...

    @property
    def silence(self) -> float:
        """Seconds since the oldest unanswered ping; 0 if none is unanswered."""

    async def call(
        self,
        message: Message,
        call_id: int | None = None,
        *,
        deadline: float | None = None,
        clock: ServiceTimer | None = None,
    ) -> Message:
        """Sends a request and waits for its reply.

        Args:
            message: the request.
            call_id: from `next_id`, for callers that refer to the call later.
            deadline: seconds for which the server may work on the request; None takes `request_timeout`.
            clock: counts these seconds, for callers that read them too.

        Raises:
            PeerFailure: the connection or the server failed, or the server refuses.
        """

    def next_id(self) -> int:
        """A new call id, for callers that refer to the call later."""

    async def register_adapter(self, adapter: Adapter, wire_dtype: str) -> int:
        """Sends an adapter to the server before the requests that refer to it.

        Args:
            adapter: of the blocks of these requests.
            wire_dtype: the dtype in which to send it.

        Returns:
            The key by which requests on this connection refer to the adapter.

        Raises:
            PeerFailure: the connection has failed; or the server does not hold the active adapter, whose values are
                not here.
        """

    def forget_adapters(self) -> None:
        """Notes that the server has dropped a registered adapter: all are sent again when next needed."""

    def tell(self, message: Message, call_id: int = 0) -> None:
        """Sends a message that needs no answer. Does nothing if the connection is lost."""

    def close(self) -> None: ...
