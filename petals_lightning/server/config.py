"""The options of a server."""

from __future__ import annotations

from dataclasses import dataclass

from petals_lightning.errors import ConfigurationError
from petals_lightning.options import FINITE_ABOVE_0, FINITE_FROM_0, SHARE, Rule, described, option
from petals_lightning.protocol.quant_types import QUANT_TYPES, UNQUANTIZED
from petals_lightning.server.access.limits import GIB, ServerLimits

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def parse_block_indices(text: str) -> tuple[int, int]:
    """`a:b` as (a, b).

    Raises:
        ConfigurationError: it is not of that form.
    """
    try:
        start, end = (int(part) for part in text.split(":"))
    except ValueError as e:
        raise ConfigurationError(f"--block-indices {text!r}: give START:END, END exclusive, e.g. 0:16") from e
    return start, end


def parse_devices(words: list[str]) -> tuple[str, ...]:
    """`["a,b", "c"]` as ("a", "b", "c")."""
    return tuple(device for word in words for device in word.split(","))


@described
@dataclass(frozen=True)
class ServerConfig(ServerLimits):
    """What a server holds, offers and grants. This is the only place where these options are declared.

    `Server`, the flags of `petals-lightning serve`, the servers of `LocalSwarm`, and docs/options.md follow from the
    fields of this class and of `ServerLimits`.
    """

    block_indices: tuple[int, int] | None = option(
        None, "Blocks to hold, START:END with END exclusive.", metavar="START:END", parse=parse_block_indices
    )
    num_blocks: int | None = option(
        None,
        "How many blocks to hold, where the swarm is thinnest, instead of block_indices.",
        FINITE_ABOVE_0,
        default_words="as many as fit in memory",
    )
    memory: int | None = option(
        None,
        "Memory of the device for blocks and budgets, where neither block_indices nor num_blocks is given (GiB on the "
        "command line).",
        FINITE_ABOVE_0,
        default_words="what is free",
        unit=GIB,
    )
    max_disk_bytes: int | None = option(
        None,
        "Disk space of the hub's cache, beyond which no shard is downloaded (GiB on the command line).",
        FINITE_ABOVE_0,
        flag="--max-disk-space",
        default_words="no limit",
        unit=GIB,
    )
    dht_prefix: str | None = option(
        None, "Name of the model in the swarm; needed for a local folder.", default_words="derived from the hub id"
    )
    device: str | None = option(
        None, "Where the blocks run: cpu, cuda, cuda:1, and so on.", default_words="cuda where there is one"
    )
    devices: tuple[str, ...] | None = option(
        None,
        "Several devices, instead of device: cuda:0,cuda:1. Each holds consecutive blocks, by its free memory.",
        metavar="DEVICE,DEVICE",
        parse=parse_devices,
    )
    dtype: str = option(
        "auto",
        "Data type of the blocks: float32, float16, bfloat16, or auto, which is the checkpoint's.",
        Rule(lambda value: value in _DTYPES, "choose auto, float32, float16 or bfloat16"),
    )
    quant_type: str = option(
        UNQUANTIZED,
        "How the weights of the blocks' linear modules are kept: none, as they are; int8; or nf4, in four bits. These "
        "two need bitsandbytes, take about 0.5 and 0.28 of the memory of bfloat16, and round.",
        Rule(lambda value: value in QUANT_TYPES, f"choose {', '.join(QUANT_TYPES[:-1])} or {QUANT_TYPES[-1]}"),
    )
    adapters: tuple[str, ...] = option(
        (),
        "Folder or hub id of LoRA in PEFT's format, to hold for all clients, who choose it by name (active_adapter). "
        "Give the flag again for more.",
        metavar="DIR",
    )
    threads: int | None = option(None, "CPU threads for computing.", FINITE_ABOVE_0, default_words="all cores")
    public_name: str | None = option(None, "Name shown to users of the swarm.")
    throughput: float | None = option(None, "Requests a second to announce.", FINITE_ABOVE_0, default_words="measured")
    update_period: float = option(60.0, "Seconds between announcements. Records live twice as long.", FINITE_ABOVE_0)
    balance_quality: float = option(
        0.95,
        "A server that has chosen its blocks itself moves to others if that brings the swarm's weakest block, whose "
        "throughput is now below this share of what moves can reach, there. 0: it never moves.",
        SHARE,
    )
    balance_period: float = option(
        120.0,
        "Seconds between two looks at whether to move, on average; after a move, five times as long.",
        FINITE_ABOVE_0,
    )
    drain_timeout: float = option(
        60.0,
        "Seconds that a server which moves goes on with what clients have begun. Then their sessions are rebuilt "
        "elsewhere.",
        FINITE_FROM_0,
    )
    metrics_port: int | None = option(
        None,
        "Port of figures for Prometheus.",
        Rule(lambda value: 0 < value < 1 << 16, "it is a port, from 1 to 65535"),
    )
    metrics_host: str = option("127.0.0.1", "Address of figures for Prometheus; 0.0.0.0 shows them to everybody.")
    allow_peers: str | None = option(
        None,
        "File of peer ids, one a line; only these may use this server.",
        metavar="FILE",
        default_words="everybody may",
    )
    token_file: str | None = option(None, "File of the swarm's shared token, which clients must know.", metavar="FILE")
    petals_only: bool = option(False, "Offer Petals' methods only, and not our faster one.")
    share_prefix: bool = option(
        True, "Run prompts once for the whole batch, where the family allows it; if False, with every sample."
    )
