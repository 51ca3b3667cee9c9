"""How a client finds and treats servers."""

from __future__ import annotations

from dataclasses import dataclass, field

from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.auth import check_token
from petals_lightning.protocol.requests import WIRE_DTYPES


@dataclass(frozen=True)
class ClientConfig:
    """How a client behaves.

    Args:
        connect_timeout: seconds to open a stream to a server.
        request_timeout: seconds that a server may work on one request while it answers heartbeats, at most; time in its
            queue does not count.
        min_request_timeout: the same, at least. In between, `deadline_factor` times what such requests have taken.
        deadline_factor: see `min_request_timeout`.
        hedge_factor: a request that takes this many times its expected time is tried elsewhere too, and the first
            answer is taken; None never does so.
        audit_rate: share of requests, from 0 to 1, that are computed again on another server and compared.
        trusted_servers: peer ids that are believed: they are asked first to compute again, and are not audited
            themselves.
        server_to_server: servers forward activations and gradients to the next server instead of sending them back
            here in between. Not with `audit_rate`, which needs what enters every server.
        heartbeat_period: seconds of silence after which a server that owes an answer is asked whether it lives.
        heartbeat_timeout: seconds of silence after which it counts as hung.
        max_retries: how often one server may fail at a part of a step before the step does. Several servers may fail
            more often in all, within `recovery_timeout` seconds.
        recovery_timeout: seconds to wait for a block whose every holder has failed.
        ban_period: seconds that a failed server is left alone at first; doubles with every further failure.
        refresh_period: seconds between looks at the swarm's records.
        allowed_servers: peer ids that alone may be used; None allows all.
        blocked_servers: peer ids that are never used.
        swarm_token: secret that servers and clients of a private swarm share; servers that do not know it are not used.
        wire_dtype: of activations and gradients on the wire; "auto" is 16 bits where a server computes in 16 bits.
            "int8_blockwise" halves that again at some loss of precision, and is "auto" for servers that cannot read it.
        min_microbatch_tokens: batches are not cut into parts smaller than this, even if a chain would be filled sooner.
            Within both limits the size follows from measured times.
        max_microbatch_tokens: nor sent in parts larger than this.
    """

    connect_timeout: float = 6.0
    request_timeout: float = 300.0
    min_request_timeout: float = 15.0
    deadline_factor: float = 20.0
    hedge_factor: float | None = 4.0
    audit_rate: float = 0.0
    trusted_servers: tuple[str, ...] = ()
    server_to_server: bool = True
    heartbeat_period: float = 1.0
    heartbeat_timeout: float = 6.0
    max_retries: int = 8
    recovery_timeout: float = 60.0
    ban_period: float = 1.0
    refresh_period: float = 30.0
    allowed_servers: tuple[str, ...] | None = None
    blocked_servers: tuple[str, ...] = ()
    swarm_token: str | None = field(default=None, repr=False)  # it must reach no log
    wire_dtype: str = "auto"
    min_microbatch_tokens: int = 64
    max_microbatch_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in (
            "connect_timeout",
            "request_timeout",
            "min_request_timeout",
            "deadline_factor",
            "heartbeat_period",
            "heartbeat_timeout",
            "recovery_timeout",
            "ban_period",
            "refresh_period",
            "min_microbatch_tokens",
            "max_microbatch_tokens",
        ):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}: it must be above 0")
        if self.max_retries < 0:
            raise ConfigurationError(f"max_retries is {self.max_retries}: it must be 0 or more")
        if self.hedge_factor is not None and not self.hedge_factor > 1:
            raise ConfigurationError(f"hedge_factor is {self.hedge_factor!r}: it must be above 1, or None for never")
        if not 0 <= self.audit_rate <= 1:
            raise ConfigurationError(f"audit_rate is {self.audit_rate!r}: it is a share, from 0 to 1")
        if self.swarm_token is not None:
            check_token(self.swarm_token)
        if self.wire_dtype != "auto" and self.wire_dtype not in WIRE_DTYPES:
            raise ConfigurationError(f"wire_dtype is {self.wire_dtype!r}: choose auto or one of {sorted(WIRE_DTYPES)}")
