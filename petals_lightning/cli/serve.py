"""`petals-lightning serve`: hold blocks of a model and run them for the swarm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from petals_lightning.cli.options import (
    AnnounceMaddrs,
    HostMaddrs,
    IdentityPath,
    InitialPeers,
    StopSignal,
    configure_logging,
    say,
)
from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.library_messages import libraries_to_root_log


def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a Hugging Face decoder.")],
    initial_peers: InitialPeers = None,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm instead of joining one.")] = False,
    block_indices: Annotated[
        str | None, typer.Option(help="Blocks to hold, START:END with END exclusive.", metavar="START:END")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="How many blocks to hold, where the swarm is thinnest.", show_default="all")
    ] = None,
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name of the model in the swarm; needed for a local folder.")
    ] = None,
    host_maddrs: HostMaddrs = ["/ip4/0.0.0.0/tcp/0"],  # noqa: B006 (typer reads the default, nobody changes it)
    announce_maddrs: AnnounceMaddrs = None,
    identity_path: IdentityPath = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="cuda where there is one")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the checkpoint's.")] = "auto",
    public_name: Annotated[str | None, typer.Option(help="Name shown to users of the swarm.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for computing.", show_default="all cores")] = None,
    graph_memory: Annotated[float, typer.Option(help="GiB for autograd graphs that wait for their backward.")] = 2.0,
    cache_memory: Annotated[float, typer.Option(help="GiB for keys and values of inference sessions.")] = 4.0,
    max_batch_tokens: Annotated[int, typer.Option(help="Largest batch × tokens of one request.")] = 1 << 16,
    throughput: Annotated[
        float | None, typer.Option(help="Requests a second to announce.", show_default="measured")
    ] = None,
    update_period: Annotated[float, typer.Option(help="Seconds between announcements.")] = 60.0,
    allow_peers: Annotated[
        str | None, typer.Option(help="File of peer ids, one a line, that alone may use this server.", metavar="FILE")
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(help="File of the swarm's shared token, which clients must know.", metavar="FILE")
    ] = None,
    petals_only: Annotated[
        bool, typer.Option("--petals-only", help="Offer Petals' methods only, and not our faster one.")
    ] = False,
    share_prefix: Annotated[
        bool,
        typer.Option(
            "--share-prefix/--no-share-prefix",
            help="Run prompts once for the whole batch, where the family allows it, or with every sample.",
        ),
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log warnings and messages of other libraries, too.")
    ] = False,
    token: Annotated[str | None, typer.Option(help="Hub token for gated models.", envvar="HF_TOKEN")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
) -> None:
    """Hold blocks of MODEL and run them for clients, forward and backward."""
    if new_swarm == bool(initial_peers):
        raise ConfigurationError(
            "give either --initial-peers MADDR (the address that a server or `petals-lightning bootstrap` printed) "
            "to join a swarm, or --new-swarm to start one"
        )
    if block_indices is not None and num_blocks is not None:
        raise ConfigurationError("give --block-indices or --num-blocks, not both")
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ConfigurationError(f"--dtype {dtype!r}: choose auto, float32, float16 or bfloat16")
    for name, value in (
        ("--update-period", update_period),
        ("--max-batch-tokens", max_batch_tokens),
        ("--num-blocks", num_blocks),
        ("--threads", threads),
        ("--throughput", throughput),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"{name} is {value:g}: it must be above 0")
    for name, value in (("--graph-memory", graph_memory), ("--cache-memory", cache_memory)):
        if not 0 <= value < math.inf:
            raise ConfigurationError(f"{name} is {value:g}: it must be 0 or more")
    configure_logging(verbose)
    from petals_lightning.protocol.auth import read_token
    from petals_lightning.server.access.rules import AccessRules, read_peer_list

    rules = AccessRules(
        allowed_peers=read_peer_list(allow_peers) if allow_peers is not None else None,
        token=read_token(token_file) if token_file is not None else None,
    )
    stop = StopSignal()

    import torch  # after OMP_WAIT_POLICY is set, and not for --help

    from petals_lightning.hf import Checkpoint
    from petals_lightning.server.access.limits import ServerLimits
    from petals_lightning.server.server import Server, parse_block_indices
    from petals_lightning.swarm import SwarmNode

    libraries_to_root_log()
    if threads is not None:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built for the device
        raise ConfigurationError(f"--device {device!r} cannot be used here: {str(e).splitlines()[0]}") from e
    progress = _LoadingBar()
    server = Server(
        Checkpoint(model, revision=revision, token=token),
        SwarmNode(
            initial_peers or [],
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity_path=identity_path,
        ),
        block_indices=parse_block_indices(block_indices) if block_indices is not None else None,
        num_blocks=num_blocks,
        dht_prefix=dht_prefix,
        device=device,
        dtype=dtype,
        public_name=public_name,
        throughput=throughput,
        update_period=update_period,
        limits=ServerLimits(
            graph_bytes=int(graph_memory * 2**30),
            cache_bytes=int(cache_memory * 2**30),
            max_batch_tokens=max_batch_tokens,
        ),
        rules=rules,
        petals_only=petals_only,
        share_prefix=share_prefix,
        on_shard=progress.on_shard,
    )

    def say_addresses() -> None:  # before loading, so that others can join meanwhile
        for maddr in server.node.visible_maddrs():
            say(f"multiaddress: {maddr}")

    with progress:
        running = server.start(say_addresses)
    try:
        span = running.span
        say(f"ready: blocks {span.start}:{span.end} of {running.dht_prefix} in {str(span.dtype)[6:]} on {span.device}")
        if not stop.wait_while(lambda: running.node.is_alive):
            raise SwarmConnectionError(
                "the libp2p daemon of this server has ended: nobody can reach it; start it again"
            )
        say("leaving: finishing what is under way")
    finally:
        running.stop()


class _LoadingBar:
    """Shards fetched and opened, with a rate; silent where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("loading {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("blocks", total=None)
        self.on_shard: Callable[[str, int, int], None] = self._update

    def _update(self, name: str, number: int, count: int) -> None:
        self._progress.update(self._task, description=name, completed=number, total=count)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
