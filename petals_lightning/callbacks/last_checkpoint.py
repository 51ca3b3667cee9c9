"""The checkpoint from which an interrupted run continues."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from petals_lightning.errors import ConfigurationError

# Copies in a run's folder: the best checkpoint, the last, and the one being written; each with Adam's two moments.
CHECKPOINTS = 3
COPIES_OF_WEIGHTS = 3
LOGS_BYTES = 16 * 2**20


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint of the newest state: at the end of each epoch, every `period`, and on errors and Ctrl-C.

    (Lightning's ModelCheckpoint does any one of these, not all three.) The file is replaced atomically: if the process
    is killed while saving, the previous checkpoint remains.

    Args:
        path: the file, e.g. `…/last.ckpt`.
        period: seconds between two checkpoints within an epoch.

    Raises:
        ConfigurationError: raised before the first step if the disk has no room for the run's checkpoints.
    """

    def __init__(self, path: str | Path, period: float = 300.0):
        self.path, self.period = Path(path), period
        self._saved_at = 0.0
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _require_room(self.path.parent, pl_module)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        # Not after an epoch's last batch: Lightning 2.6 would skip its validation on resuming, and count its batches
        # wrongly on resuming again. The end of the epoch saves soon.
        if not trainer.is_last_batch and time.monotonic() - self._saved_at >= self.period:
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


def _require_room(folder: Path, module: pl.LightningModule) -> None:
    weights = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    needed = CHECKPOINTS * COPIES_OF_WEIGHTS * weights + LOGS_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigurationError(
            f"{folder}: {free / 2**20:.0f} MiB free on its disk, and the run's checkpoints and logs need "
            f"{needed / 2**20:.0f} MiB; free some or set path=… to another disk"
        )
