"""A client: finds servers, keeps streams to them, and runs blocks on them as if they were local modules."""

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.remote_sequential import RemoteSequential

__all__ = ["ClientConfig", "RemoteSequential"]
