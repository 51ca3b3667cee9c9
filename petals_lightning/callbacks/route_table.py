"""The machines and what they compute, shown before training."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich import get_console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from petals_lightning.models import remote_blocks


class RouteTable(Callback):
    """Prints the trained parameters on this machine, and the servers that hold the blocks."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        console = get_console()
        trained = [weight for weight in pl_module.parameters() if weight.requires_grad]
        frozen = [weight for weight in pl_module.parameters() if not weight.requires_grad]
        console.print(
            f"here: {_count(trained):,} trained parameters ({_bytes(trained) / 1e3:,.0f} kB a checkpoint), "
            f"{_count(frozen):,} frozen ones ({_bytes(frozen) / 1e6:,.1f} MB)",
            soft_wrap=True,
        )
        blocks = remote_blocks(pl_module)
        if blocks is None:
            console.print("no swarm: all blocks are in this process")
            return
        table = Table(title="route", title_justify="left")
        table.add_column("blocks", justify="right")
        table.add_column("server")
        table.add_column("peer")
        for span in blocks.route():
            table.add_row(f"{span.start}:{span.end}", escape(span.public_name or "–"), f"…{span.peer_id[-10:]}")
        console.print(table)


def _count(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _bytes(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
