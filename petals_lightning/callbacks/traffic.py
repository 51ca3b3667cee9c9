"""Traffic of a module's remote blocks."""

from __future__ import annotations

from torch import nn

from petals_lightning.client.stats import TransferStats
from petals_lightning.models import remote_blocks


def traffic_metrics(module: nn.Module) -> dict[str, int]:
    """Bytes over the network and retries, as metrics; zeros if all blocks are in this process."""
    blocks = remote_blocks(module)
    stats = blocks.stats if blocks is not None else TransferStats()
    return {
        "swarm/bytes_sent": stats.bytes_sent,
        "swarm/bytes_received": stats.bytes_received,
        "swarm/retries": stats.retries,
    }
