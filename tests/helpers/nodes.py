"""Peers that take streams."""

from __future__ import annotations

from pathlib import Path

from petals_lightning.swarm import SwarmNode


def listen(node: SwarmNode) -> Path:
    """Makes the node take streams, as servers do; returns the socket that its daemon calls back on."""

    async def handler(*args: object) -> None:
        return None

    node.run(node.p2p.add_binary_stream_handler("test", handler))
    return Path(node.p2p._client_listen_maddr["unix"])
