"""Traffic of a module's remote blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from petals_lightning.models import remote_blocks


@dataclass(frozen=True)
class Traffic:
    """Bytes over the network, and retries."""

    bytes_sent: int = 0
    bytes_received: int = 0
    retries: int = 0

    @classmethod
    def of(cls, module: nn.Module) -> Traffic:
        """The traffic of a module; zero if all its blocks are in this process."""
        blocks = remote_blocks(module)
        if blocks is None:
            return cls()
        stats = blocks.stats
        return cls(stats.bytes_sent, stats.bytes_received, stats.retries)

    def as_metrics(self) -> dict[str, int]:
        return {
            "swarm/bytes_sent": self.bytes_sent,
            "swarm/bytes_received": self.bytes_received,
            "swarm/retries": self.retries,
        }
