"""Where a run's swarm comes from: the interface that RemoteBlockStrategy uses."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.auth import read_token


@dataclass(frozen=True)
class ServedModel:
    """The model whose blocks a swarm has to serve."""

    name_or_path: str
    dtype: str = "auto"
    revision: str | None = None
    dht_prefix: str | None = None
    """The name of its blocks in the swarm; None: a folder's own name, or what is derived from a hub id."""

    def __post_init__(self) -> None:
        path = Path(self.name_or_path)
        if self.dht_prefix is None and path.is_dir():
            # Neither dots nor white space may stand in it.
            object.__setattr__(self, "dht_prefix", re.sub(r"[.\s]+", "-", path.resolve().name))


class SwarmSource(ABC):
    """Brings a swarm up and down. Re-entrant: it is up from the first `acquire` to the last `release`.

    Args:
        connect_timeout: seconds to reach the swarm or a server; None leaves the client's default. So below.
        request_timeout: seconds that a server may work on one request while it answers heartbeats; queueing does not
            count.
        max_retries: how often one server may fail at a part of a step before the step fails.
        recovery_timeout: seconds to wait for a block whose every holder has failed, before training ends.
        allowed_servers: peer ids to use; None: all.
        blocked_servers: peer ids never to use.
        audit_rate: share of requests that are computed again on another server and compared.
        trusted_servers: peer ids that are believed where two disagree.
        server_to_server: servers forward activations to the next server; False: every hop returns to the client.
        wire_dtype: of activations and gradients on the wire: auto (16 bits where a server computes in 16 bits),
            float32, bfloat16, float16 or int8_blockwise.
        min_microbatch_tokens: batches are not cut finer than this to fill a chain; a large value keeps them whole.
        identity_path: file of this client's private key, by which servers with --allow-peers know it; made if missing.
        token_file: file of the secret that a private swarm's servers were given with --token-file.
        batches_in_flight: evaluation batches (of validation, test, prediction) that are on their way at once. Each
            takes the memory of a forward here.

    Raises:
        ConfigurationError: `batches_in_flight` is below 1.
    """

    def __init__(
        self,
        connect_timeout: float | None = None,
        request_timeout: float | None = None,
        max_retries: int | None = None,
        recovery_timeout: float | None = None,
        allowed_servers: list[str] | None = None,
        blocked_servers: list[str] | None = None,
        audit_rate: float | None = None,
        trusted_servers: list[str] | None = None,
        server_to_server: bool | None = None,
        wire_dtype: str | None = None,
        min_microbatch_tokens: int | None = None,
        identity_path: str | None = None,
        token_file: str | None = None,
        batches_in_flight: int = 4,
    ):
        if batches_in_flight < 1:
            raise ConfigurationError(f"batches_in_flight={batches_in_flight}: must be at least 1, one at a time")
        self.batches_in_flight = batches_in_flight
        options = {
            "connect_timeout": connect_timeout,
            "request_timeout": request_timeout,
            "max_retries": max_retries,
            "recovery_timeout": recovery_timeout,
            "allowed_servers": allowed_servers,
            "blocked_servers": blocked_servers,
            "audit_rate": audit_rate,
            "trusted_servers": trusted_servers,
            "server_to_server": server_to_server,
            "wire_dtype": wire_dtype,
            "min_microbatch_tokens": min_microbatch_tokens,
            "identity_path": identity_path,
            "swarm_token": read_token(token_file) if token_file is not None else None,
        }
        self._options = {key: value for key, value in options.items() if value is not None}
        self._users = 0

    def acquire(self, model: ServedModel, log_dir: Path) -> dict[str, Any]:
        """Brings the swarm up, if it is not, and returns the swarm's keyword arguments of `from_pretrained`.

        Raises:
            SwarmError: the swarm cannot be brought up; nothing is left running.
        """
        if self._users == 0:
            self._start(model, log_dir)
        self._users += 1
        return self._options | self._arguments(model)

    def release(self) -> None:
        """Gives the swarm up; the last user's release takes down what `acquire` started."""
        self._users -= 1
        if self._users == 0:
            self._stop()

    @contextmanager
    def held(self, model: ServedModel, log_dir: Path) -> Iterator[None]:
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
        """Starts what this source owns. Others' swarms need nothing."""

    def _stop(self) -> None:  # noqa: B027 (optional)
        """Takes down what `_start` started."""
