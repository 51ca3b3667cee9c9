"""Errors in OpenAI's form."""

from __future__ import annotations

import logging
from typing import Any

from petals_lightning.errors import (
    AccessDeniedError,
    ConfigurationError,
    PetalsLightningError,
    SwarmError,
    UnsupportedInputError,
)

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for people.
        kind: OpenAI's `type`.
        param: the field of the request that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.body = status, {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }  # fmt: skip

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The answer to a request that ended with an error. One that is not the caller's or the swarm's is logged."""
        match error:
            case ApiError():
                return error
            case ConfigurationError() | UnsupportedInputError():
                return cls(400, str(error))
            case AccessDeniedError():
                return cls(502, str(error), kind="server_error")
            case SwarmError():
                return cls(503, str(error), kind="server_error", code="swarm_unavailable")
            case PetalsLightningError():
                return cls(500, str(error), kind="server_error")
        logger.error("a request failed", exc_info=error)
        return cls(500, f"an error of the server's ({type(error).__name__}); its log has more", kind="server_error")


def wrong_field(details: Any) -> ApiError:
    """The answer to a request whose fields were found wrong, by pydantic's list of errors."""
    first = details[0]
    path = ".".join(str(part) for part in first["loc"] if part != "body")
    return ApiError(400, f"{path or 'the request'}: {first['msg']}", param=path or None)
