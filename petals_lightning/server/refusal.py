"""How a server refuses a request."""

from __future__ import annotations

from petals_lightning.protocol.messages import ErrorCode, Message


class Refusal(Exception):
    """Ends a request with an error code and a message for the client."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code

    def to_message(self) -> Message:
        """The answer by which the client learns of it."""
        return Message.error(self.code, str(self))
