"""The interface of swarms that RemoteBlockStrategy uses."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_lightning.client import ClientConfig
from petals_lightning.options import make


@dataclass(frozen=True)
class ServedModel:
    """The model whose blocks a swarm has to serve."""

    name_or_path: str
    dtype: str = "auto"
    revision: str | None = None
    dht_prefix: str | None = None
    """Name of the model in the swarm; None: the folder's name, or a name derived from the hub id."""

    def __post_init__(self) -> None:
        path = Path(self.name_or_path)
        if self.dht_prefix is None and path.is_dir():
            # It may contain neither dots nor white space.
            object.__setattr__(self, "dht_prefix", re.sub(r"[.\s]+", "-", path.resolve().name))


class SwarmProvider(ABC):
    """Brings a swarm up and down. Re-entrant: it is up from the first `acquire` to the last `release`.

    Args:
        **options: of `ClientConfig`, e.g. `audit_rate=0.05`; None leaves the default.

    Raises:
        ConfigurationError: a value is out of range.
    """

    def __init__(self, **options: Any):
        self.client_config = make(ClientConfig, options)
        self._users = 0

    def acquire(self, model: ServedModel, log_dir: Path) -> dict[str, Any]:
        """Starts the swarm unless it is running. Returns keyword arguments of `from_pretrained` that connect to it.

        Raises:
            SwarmError: the swarm cannot be started; nothing is left running.
        """
        config = self.client_config.with_token()  # before anything is started
        if self._users == 0:
            self._start(model, log_dir)
        self._users += 1
        return {"client_config": config, **self._arguments(model)}

    def release(self) -> None:
        """Ends one use of the swarm; the last release stops what `acquire` started."""
        self._users -= 1
        if self._users == 0:
            self._stop()

    @contextmanager
    def keep_alive(self, model: ServedModel, log_dir: Path) -> Iterator[None]:
        """Keeps the swarm up between several uses, e.g. `trainer.fit` and `trainer.test`."""
        self.acquire(model, log_dir)
        try:
            yield
        finally:
            self.release()

    @abstractmethod
    def _arguments(self, model: ServedModel) -> dict[str, Any]:
        """At least `initial_peers`."""

    def _start(self, model: ServedModel, log_dir: Path) -> None:  # noqa: B027 (optional)
        """Starts the processes that belong to this swarm, if any."""

    def _stop(self) -> None:  # noqa: B027 (optional)
        """Stops the processes that `_start` started."""
