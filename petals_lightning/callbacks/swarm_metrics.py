"""Speed and traffic of a run, for its logger."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from petals_lightning.callbacks.traffic import traffic_metrics


class SwarmMetrics(Callback):
    """Logs the speed of training and the swarm's traffic every `log_every_n_steps` of the Trainer.

    Metrics: `train/tokens_per_second` (without padding and prompts) and totals of the run, `swarm/bytes_sent`,
    `swarm/bytes_received` and `swarm/retries`.
    """

    def __init__(self) -> None:
        self._tokens, self._since = 0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += int(batch["attention_mask"].sum())
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (batch_idx + 1) % every:
            return
        now = time.monotonic()
        pl_module.log("train/tokens_per_second", self._tokens / (now - self._since), prog_bar=True, batch_size=1)
        self._tokens, self._since = 0, now
        for name, value in traffic_metrics(pl_module).items():
            pl_module.log(name, float(value), batch_size=1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Validation between two steps is not training time.
        self._tokens, self._since = 0, time.monotonic()
