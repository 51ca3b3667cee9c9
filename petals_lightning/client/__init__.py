"""A client: finds servers, keeps streams to them, and runs blocks on them as if they were local modules."""

from typing import TYPE_CHECKING, Any

from petals_lightning.client.config import ClientConfig

if TYPE_CHECKING:
    from petals_lightning.client.remote_sequential import RemoteSequential

__all__ = ["ClientConfig", "RemoteSequential"]


def __getattr__(name: str) -> Any:
    if name == "RemoteSequential":  # options must be there without torch
        from petals_lightning.client.remote_sequential import RemoteSequential

        return RemoteSequential
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
