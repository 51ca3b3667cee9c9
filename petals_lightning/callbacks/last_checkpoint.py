"""The checkpoint that an interrupted run continues from."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint of the newest state: at the end of each epoch, every `period`, and on errors and Ctrl-C.

    (Lightning's ModelCheckpoint does one of these, not all three.) The file is replaced in one move, so that being
    killed while saving leaves the one before.

    Args:
        path: the file, e.g. `…/last.ckpt`.
        period: seconds between two checkpoints within an epoch.
    """

    def __init__(self, path: str | Path, period: float = 300.0):
        self.path, self.period = Path(path), period
        self._saved_at = 0.0
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if time.monotonic() - self._saved_at >= self.period:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step > max(self._saved_step, 0):
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        os.replace(partial, self.path)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
