"""Modules and trainers of Lightning, quick and quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from petals_lightning.callbacks import LastCheckpoint
from petals_lightning.modules import SequenceClassificationModule
from tools.testing.swarms import PREFIX


class Losses(Callback):
    """Records each step's loss.

    Args:
        stop_at: the step before which it interrupts the run; None for none.
    """

    def __init__(self, stop_at: int | None = None):
        self.values: dict[int, float] = {}
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.stop_at:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        self.values[trainer.global_step] = float(outputs["loss"])


def make_module(text_model: Path, **settings: Any) -> SequenceClassificationModule:
    """A classifier with deep prompts, the same in every call."""
    torch.manual_seed(0)
    return SequenceClassificationModule(str(text_model), **{"pre_seq_len": 3, "dht_prefix": PREFIX, **settings})


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    """Two epochs without a logger; `settings` are those of Lightning's Trainer. Checkpoints only by a callback."""
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1}
    return pl.Trainer(
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint | LastCheckpoint) for callback in callbacks),
        **{**defaults, **settings},
    )
