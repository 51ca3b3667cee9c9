"""train.py in a process that kills itself at a given moment: `python -m tests.training.killed_run OUT MOMENT ARGS`.

Writes a line `step loss` to OUT for every training step, at once. MOMENT is "after 5" (steps), "before 5" (steps have
been made and the next begins), "validation 5" (steps made), "fail 5" (as before, but an error of the swarm) or "never".
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from petals_lightning.errors import NoServersError
from petals_lightning.training import run as run_module

ROOT = Path(__file__).resolve().parents[2]


class KillAt(Callback):
    def __init__(self, losses: Path, moment: str):
        self._losses, self._moment = losses, moment

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._kill_if(f"before {trainer.global_step}")
        if self._moment == f"fail {trainer.global_step}":
            raise NoServersError("nobody serves block 3")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        with open(self._losses, "a") as file:
            print(trainer.global_step, float(outputs["loss"]).hex(), file=file)
        self._kill_if(f"after {trainer.global_step}")

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self._kill_if(f"validation {trainer.global_step}")

    def _kill_if(self, moment: str) -> None:
        if moment == self._moment:
            os.kill(os.getpid(), signal.SIGKILL)


def main(losses: str, moment: str, *overrides: str) -> None:
    build = run_module.build_trainer

    def build_with_kill(*args: Any, **kwargs: Any) -> pl.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks.append(KillAt(Path(losses), moment))  # type: ignore[attr-defined]
        return trainer

    run_module.build_trainer = build_with_kill
    sys.argv = ["train.py", *overrides]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
