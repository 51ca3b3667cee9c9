"""`petals-lightning dashboard`: a page that shows a swarm, and a run."""

from __future__ import annotations

from typing import Annotated

import typer

from petals_lightning.cli.http import ApiKeyFile, Host, Port, Run, bind, check_access, run_app
from petals_lightning.cli.options import InitialPeers, configure_logging
from petals_lightning.library_messages import libraries_to_root_log


def dashboard(
    initial_peers: InitialPeers = None,
    dht_prefix: Annotated[
        list[str] | None, typer.Option(help="Only this model, also if it is not listed; needs --num-blocks then.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of a model that is not listed.")] = None,
    run: Run = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Show a swarm on a page: blocks, servers, weak spots. The public Petals network by default."""
    keys = check_access(host, api_key_file)
    configure_logging()

    from petals_lightning.api.app import create_app, is_loopback
    from petals_lightning.api.swarm_watch import SwarmWatch
    from petals_lightning.swarm import PUBLIC_INITIAL_PEERS, SwarmNode

    libraries_to_root_log()
    with (
        bind(host, port) as listening,
        SwarmNode(initial_peers or PUBLIC_INITIAL_PEERS, host_maddrs=(), client_mode=True).start() as node,
    ):
        watch = SwarmWatch(node, dht_prefix or (), num_blocks, others=not dht_prefix)
        app = create_app(watch, keys=keys, is_local=is_loopback(host) and keys is None, run=run)
        run_app(app, listening, "the page", node)
