"""`petals-lightning serve`: hold blocks of a model and run them for the swarm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from petals_lightning.cli.options import (
    AnnounceMaddrs,
    HostMaddrs,
    IdentityPath,
    InitialPeers,
    LogFormat,
    StopSignal,
    configure_logging,
    say,
    with_options,
)
from petals_lightning.cli.pauses import Pause, QuietHours
from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.library_messages import libraries_to_root_log
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.server.config import ServerConfig

if TYPE_CHECKING:
    from petals_lightning.swarm import SwarmNode


@with_options
def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a Hugging Face decoder.")],
    config: ServerConfig,
    initial_peers: InitialPeers = None,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm instead of joining one.")] = False,
    host_maddrs: HostMaddrs = ["/ip4/0.0.0.0/tcp/0"],  # noqa: B006 (typer reads the default, nobody changes it)
    announce_maddrs: AnnounceMaddrs = None,
    identity_path: IdentityPath = None,
    relay: Annotated[
        str,
        typer.Option(
            help="Behind a router that lets no calls in: auto has other peers try, and calls pass an initial peer if "
            "they cannot; always does so without trying; never does neither."
        ),
    ] = "auto",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log warnings and messages of other libraries, too.")
    ] = False,
    log_format: LogFormat = "text",
    token: Annotated[str | None, typer.Option(help="Hub token for gated models.", envvar="HF_TOKEN")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None,
    quiet_hours: Annotated[
        str | None,
        typer.Option(
            help="Hours of every day, e.g. 09:00-17:30, in which the server leaves the swarm and frees the device. "
            "SIGUSR1 does so at any time, until SIGUSR2."
        ),
    ] = None,
) -> None:
    """Hold blocks of MODEL and run them for clients, forward and backward."""
    if new_swarm == bool(initial_peers):
        raise ConfigurationError(
            "give either --initial-peers MADDR (the address that a server or `petals-lightning bootstrap` printed) "
            "to join a swarm, or --new-swarm to start one"
        )
    if config.block_indices is not None and config.num_blocks is not None:
        raise ConfigurationError("give --block-indices or --num-blocks, not both")
    if quiet_hours is not None and new_swarm:
        raise ConfigurationError(
            "--quiet-hours needs --initial-peers: a swarm's first server has nobody to join again; run "
            "`petals-lightning bootstrap` and join it"
        )
    configure_logging(verbose, log_format)
    stop, pause = StopSignal(), Pause(QuietHours(quiet_hours) if quiet_hours is not None else None)

    import torch  # after OMP_WAIT_POLICY is set, and not for --help

    from petals_lightning.hf import Checkpoint
    from petals_lightning.server.memory_plan import give_back_memory
    from petals_lightning.server.server import Server
    from petals_lightning.swarm import SwarmNode

    libraries_to_root_log()
    for flag, device in [("--device", config.device), *(("--devices", each) for each in config.devices or ())]:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as e:  # torch asserts that it was built for the device
            raise ConfigurationError(f"{flag} {device!r} cannot be used here: {str(e).splitlines()[0]}") from e

    def serve_until_pause() -> bool:
        """Returns whether to serve again after a pause; all that the server held is released then."""
        progress = _LoadingBar()
        node = SwarmNode(
            initial_peers or [],
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity_path=identity_path,
            relay=relay,
        )
        checkpoint = Checkpoint(model, revision=revision, token=token)
        server = Server(checkpoint, node, config=config, on_shard=progress.on_shard)
        with closing(progress):
            running = server.start(lambda: _say_addresses(node))  # before loading, so that others can join meanwhile
        try:
            span = running.span
            kept = str(span.dtype).removeprefix("torch.")
            kept = kept if span.quant_type == UNQUANTIZED else f"{span.quant_type} and {kept}"
            say(f"ready: blocks {span.start}:{span.end} of {running.dht_prefix} in {kept} on {span.device}")
            is_stopped = stop.wait_while(lambda: running.is_alive and not pause.is_wanted)
            if not is_stopped and not pause.is_wanted:
                if running.failure is not None:
                    raise running.failure
                raise SwarmConnectionError(
                    "the libp2p daemon of this server has ended: nobody can reach it; start it again"
                )
            say("leaving: finishing what is under way")
        finally:
            running.stop()
        return not is_stopped

    goes_on = True
    while goes_on:
        if pause.is_wanted:
            give_back_memory()
            say(f"paused until {pause.end}")
            goes_on = not stop.wait_while(lambda: pause.is_wanted)
        else:
            goes_on = serve_until_pause()


def _say_addresses(node: SwarmNode) -> None:
    for maddr in node.visible_maddrs():
        say(f"multiaddress: {maddr}")
    if node.using_relay:
        say("other peers cannot call this one: their calls pass a relay, which is slower")


class _LoadingBar:
    """Shows how many shards are loaded, from the first one on. Shows nothing if stderr is not a terminal.

    While it is shown, Rich cuts other lines at the terminal's width, and addresses are read and copied whole.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("loading {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),  # Rich also takes FORCE_COLOR for a terminal
            transient=True,
        )
        self._task = self._progress.add_task("blocks", total=None)
        self.on_shard: Callable[[str, int, int], None] = self._update

    def _update(self, name: str, number: int, count: int) -> None:
        self._progress.start()
        self._progress.update(self._task, description=name, completed=number, total=count)

    def close(self) -> None:
        self._progress.stop()
