"""What a step of a run costs, measured on its first ones, and what the rest will."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich import get_console

from petals_lightning.callbacks.traffic import traffic_metrics
from petals_lightning.strategies import planned_steps

_WARM_UP = 1  # steps: the first one registers prompts and opens streams
_MEASURED = 3  # steps


class StepCost(Callback):
    """Prints, after the first steps, the bytes and seconds of one, and of all that are left.

    A step is one of the optimizer. Validation and tests come on top.

    Args:
        stops: end the run then.
    """

    def __init__(self, *, stops: bool = False):
        self._stops = stops
        self._step = self._first_step = 0
        self._since = 0.0
        self._traffic: dict[str, int] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = self._first_step = trainer.global_step
        self._mark(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        done = trainer.global_step - self._first_step
        if trainer.global_step == self._step or done > _WARM_UP + _MEASURED:
            return
        self._step = trainer.global_step
        steps = planned_steps(trainer)
        is_last = steps is not None and trainer.global_step >= steps
        if done == _WARM_UP and not is_last:
            self._mark(pl_module)
        elif done == _WARM_UP + _MEASURED or is_last:
            self._print(trainer, pl_module, max(done - _WARM_UP, 1), steps)
            if self._stops:
                trainer.should_stop = True

    def _mark(self, module: pl.LightningModule) -> None:
        self._since, self._traffic = time.monotonic(), traffic_metrics(module)

    def _print(self, trainer: pl.Trainer, module: pl.LightningModule, measured: int, steps: int | None) -> None:
        seconds = (time.monotonic() - self._since) / measured
        now = traffic_metrics(module)
        sent, received = (
            (now[name] - self._traffic[name]) / measured for name in ("swarm/bytes_sent", "swarm/bytes_received")
        )
        step = f"{_bytes(sent)} sent, {_bytes(received)} received, {_seconds(seconds)}"
        line = f"a step costs {step} (of {measured} measured)"
        if steps is not None and (left := steps - trainer.global_step):
            rest = f"{_bytes(left * (sent + received))} and {_seconds(left * seconds)}"
            line += f"; the {left:,} left of {steps:,} about {rest}, without validation"
        get_console().print(line, highlight=False, soft_wrap=True)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} bytes"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
