"""A run in a process of its own that kills itself at a given step: `python -m tests.training.killed_run OUT STEP ARGS`.

Writes a line `step loss` to OUT for every training step, at once. STEP -1 lets it end by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from pytorch_lightning.callbacks import Callback

from petals_lightning.training import run as run_module
from petals_lightning.training.recipes import find_recipes, register_recipes
from petals_lightning.training.resolvers import register_resolvers
from petals_lightning.training.schema import register_schema

ROOT = Path(__file__).resolve().parents[2]


class KillAt(Callback):
    def __init__(self, losses: Path, step: int):
        self._losses, self._step = losses, step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        with open(self._losses, "a") as file:
            print(trainer.global_step, float(outputs["loss"]).hex(), file=file)
        if trainer.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(losses: str, step: str, *overrides: str) -> None:
    register_schema()
    register_recipes(find_recipes(ROOT / "recipes"))
    register_resolvers()
    build = run_module.build_trainer

    def build_with_kill(*args: Any, **kwargs: Any) -> pl.Trainer:
        trainer = build(*args, **kwargs)
        trainer.callbacks.append(KillAt(Path(losses), int(step)))  # type: ignore[attr-defined]
        return trainer

    run_module.build_trainer = build_with_kill
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run_module.run(compose("config", list(overrides)))


if __name__ == "__main__":
    main(*sys.argv[1:])
