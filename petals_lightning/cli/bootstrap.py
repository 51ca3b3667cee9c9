"""`petals-lightning bootstrap`: a peer that holds no blocks and is always there to be joined."""

from __future__ import annotations

from petals_lightning.cli.options import (
    AnnounceMaddrs,
    HostMaddrs,
    IdentityPath,
    InitialPeers,
    LogFormat,
    StopSignal,
    configure_logging,
    say,
)
from petals_lightning.errors import SwarmConnectionError
from petals_lightning.library_messages import libraries_to_root_log


def bootstrap(
    initial_peers: InitialPeers = None,
    host_maddrs: HostMaddrs = ["/ip4/0.0.0.0/tcp/31337"],  # noqa: B006 (typer reads the default, nobody changes it)
    announce_maddrs: AnnounceMaddrs = None,
    identity_path: IdentityPath = "bootstrap.id",
    log_format: LogFormat = "text",
) -> None:
    """Run a bootstrap peer: servers and clients join the swarm through its address, which stays the same."""
    from petals_lightning.swarm import SwarmNode

    configure_logging(form=log_format)
    libraries_to_root_log()
    stop = StopSignal()
    node = SwarmNode(
        initial_peers or [],
        host_maddrs=host_maddrs,
        announce_maddrs=announce_maddrs,
        identity_path=identity_path,
        is_relay=True,
    ).start()
    try:
        for maddr in node.visible_maddrs():
            say(f"multiaddress: {maddr}")
        say("ready: give one of these addresses to servers and clients as --initial-peers")
        if not stop.wait_while(lambda: node.is_alive):
            raise SwarmConnectionError("the libp2p daemon of this peer has ended; start it again")
    finally:
        node.close()
