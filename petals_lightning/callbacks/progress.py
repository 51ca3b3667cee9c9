"""Progress of a run: a bar on a terminal, and lines that stay."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar, RichProgressBar
from pytorch_lightning.callbacks.progress.rich_progress import RichProgressBarTheme
from rich import get_console

from petals_lightning.strategies import planned_steps


def progress_bar() -> ProgressBar | None:
    """A bar with rate and remaining time on a terminal; None if output goes to a file."""
    if not get_console().is_terminal:
        return None
    theme = RichProgressBarTheme(progress_bar="cyan", progress_bar_finished="cyan", metrics_text_delimiter="  ")
    return RichProgressBar(refresh_rate=10, theme=theme)


class ProgressLines(Callback):
    """Prints a line after each validation and, without a bar, one every `period` seconds of training."""

    def __init__(self, period: float = 10.0, score: str = "val/accuracy"):
        self.period, self._score = period, score
        self._started = self._printed = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._printed = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.progress_bar_callback is None and time.monotonic() - self._printed >= self.period:
            self._print(trainer, ("train/loss",))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(trainer, ("train/loss", "val/loss", self._score))

    def _print(self, trainer: pl.Trainer, names: tuple[str, ...]) -> None:
        now = self._printed = time.monotonic()
        step, steps = trainer.global_step, planned_steps(trainer)
        rate = (step - self._first_step) / max(now - self._started, 1e-9)
        metrics = [
            f"{name} {float(trainer.callback_metrics[name]):.3f}" for name in names if name in trainer.callback_metrics
        ]
        left = f"{(steps - step) / rate:,.0f} s left" if rate and steps is not None else ""
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
        get_console().print(
            f"epoch {trainer.current_epoch + 1}{epochs}  step {step}{f'/{steps}' if steps is not None else ''}  "
            f"{'  '.join(metrics)}  {rate:.1f} steps/s  {left}",
            highlight=False,
            soft_wrap=True,
        )
