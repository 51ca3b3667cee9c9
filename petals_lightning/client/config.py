"""How a client finds and treats servers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from petals_lightning.errors import ConfigurationError
from petals_lightning.options import ABOVE_0, FROM_0, SHARE, Rule, check_options, described, option
from petals_lightning.protocol.auth import check_token, read_token
from petals_lightning.protocol.quant_types import QUANT_TYPES


@described
@dataclass(frozen=True)
class ClientConfig:
    """How a client finds and treats servers. This is the only place where its options are declared.

    `from_pretrained`, the swarms of `petals_lightning.strategies`, `swarm.…` in conf/, the flags of
    `petals-lightning chat`, `generate` and `api`, and docs/options.md follow from these fields.
    """

    connect_timeout: float = option(6.0, "Seconds to reach the swarm, and to open a stream to a server.", ABOVE_0)
    request_timeout: float = option(
        300.0,
        "Seconds that a server may work on one request while it answers heartbeats, at most. Time in its queue does "
        "not count.",
        ABOVE_0,
    )
    min_request_timeout: float = option(
        15.0,
        "The same, at least. In between, the limit is deadline_factor times what such requests have taken.",
        ABOVE_0,
    )
    deadline_factor: float = option(20.0, "See min_request_timeout.", ABOVE_0)
    hedge_factor: float | None = option(
        4.0,
        "A request that takes this many times its expected time is sent to another server too, and the first answer is "
        "taken. None (or inf) never does so.",
        Rule(lambda value: value > 1, "it must be above 1, or None for never"),
    )
    audit_rate: float = option(
        0.0, "Share of requests, from 0 to 1, that are computed again on another server and compared.", SHARE
    )
    trusted_servers: tuple[str, ...] = option(
        (),
        "Peer ids that are believed where two servers disagree. They are asked first to compute again, and are not "
        "audited themselves. Without any, only what this machine computes is believed.",
        metavar="PEER_ID",
    )
    server_to_server: bool = option(
        True,
        "Servers forward activations and gradients directly to the next server; if False, every hop returns to the "
        "client. Has no effect with audit_rate, which needs what enters every server.",
    )
    heartbeat_period: float = option(
        1.0, "Seconds of silence after which a server that owes an answer is asked whether it is alive.", ABOVE_0
    )
    heartbeat_timeout: float = option(6.0, "Seconds of silence after which a server counts as hung.", ABOVE_0)
    max_retries: int = option(
        8,
        "How often one server may fail at a part of a step before the step fails. Several servers may fail more often "
        "in all, within recovery_timeout seconds.",
        FROM_0,
    )
    recovery_timeout: float = option(
        60.0, "Seconds to wait for a block after every server that holds it has failed.", ABOVE_0
    )
    ban_period: float = option(
        1.0, "Seconds for which a failed server is not used. Doubles with every further failure.", ABOVE_0
    )
    refresh_period: float = option(30.0, "Seconds between two looks at the swarm's records.", ABOVE_0)
    allowed_servers: tuple[str, ...] | None = option(
        None, "Peer ids of the only servers that may be used. None allows all.", metavar="PEER_ID", default_words="all"
    )
    blocked_servers: tuple[str, ...] = option(
        (), "Peer ids of servers that are never used.", metavar="PEER_ID", default_words="none"
    )
    allowed_quantization: tuple[str, ...] | None = option(
        None,
        "Kinds of weights that servers may have: none (not quantised), int8, nf4. None allows all. Servers of one kind "
        "give the same results, up to rounding in their dtype.",
        Rule(
            lambda value: isinstance(value, (list, tuple)) and set(value) <= set(QUANT_TYPES),
            f"choose of {', '.join(QUANT_TYPES)}",
        ),
        metavar="KIND",
        default_words="all",
    )
    token_file: str | None = option(
        None,
        "File of the secret of a private swarm, whose servers were started with --token-file. Servers that do not know "
        "it are not used.",
        metavar="FILE",
    )
    swarm_token: str | None = option(None, "The secret itself, where there is no token_file.", secret=True)
    identity_path: str | None = option(
        None,
        "File of this client's private key, made if missing. The peer id follows from it, by which servers with "
        "--allow-peers know the client.",
        metavar="FILE",
    )
    wire_dtype: str = option(
        "auto",
        "Data type of activations and gradients on the wire: float32, bfloat16, float16, int8_blockwise, or auto, "
        "which is 16 bits where a server computes in 16 bits. int8_blockwise halves that again at some loss of "
        "precision, and is auto for servers that cannot read it.",
    )
    min_microbatch_tokens: int = option(
        64,
        "Batches are not cut into parts smaller than this to fill a chain of servers. A large value keeps them whole. "
        "Where batches are cut moves the last bits of sums.",
        ABOVE_0,
    )
    max_microbatch_tokens: int = option(8192, "Batches are not sent in parts larger than this.", ABOVE_0)

    def with_token(self) -> ClientConfig:
        """These options with the secret that `token_file` holds. Raises ConfigurationError if it cannot be read."""
        return self if self.token_file is None else replace(self, swarm_token=read_token(self.token_file))

    def __post_init__(self) -> None:
        check_options(self)
        if self.swarm_token is not None:
            check_token(self.swarm_token)
        if self.wire_dtype != "auto":
            from petals_lightning.protocol.checks import WIRE_DTYPES  # imports torch, which no option needs

            if self.wire_dtype not in WIRE_DTYPES:
                raise ConfigurationError(
                    f"wire_dtype is {self.wire_dtype!r}: choose auto or one of {sorted(WIRE_DTYPES)}"
                )
