"""This process's peer: libp2p and the DHT on one background event loop, and the records in the DHT."""

from petals_lightning.swarm.directory import SwarmDirectory
from petals_lightning.swarm.node import SwarmNode
from petals_lightning.swarm.public import PUBLIC_INITIAL_PEERS

__all__ = ["PUBLIC_INITIAL_PEERS", "SwarmDirectory", "SwarmNode"]
