"""The summary of a run in its folder: summary.json and the learning curve, as a picture and in numbers."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from petals_lightning.callbacks.learning_curve import CURVE_FILE, draw_learning_curve, validation_of_head_alone
from petals_lightning.callbacks.traffic import traffic_metrics
from petals_lightning.strategies import planned_steps

_CURVE_PERIOD = 10.0  # seconds between two writings of the curve while a run trains


class RunSummary(Callback):
    """Writes `summary.json` and `learning_curve.png` when training ends, and adds `test/…` after a test.

    The picture also shows the newest run beside this one that trained the head alone, if there is one.

    `learning_curve.json`, which `petals-lightning dashboard --run` shows, is written while it trains.

    All `val/…` are those of `checkpoint`, the run's best epoch on validation. Seconds, steps, tokens (without padding
    and prompts) and traffic are totals of the whole run, including the time before a resume. Seconds and traffic
    include validation.

    Args:
        folder: where the files are written.
        title: of the plot.
        facts: further entries of the summary, e.g. the seed.
        score: the metric that selects the best epoch.
    """

    def __init__(
        self, folder: str | Path, title: str = "", facts: dict[str, Any] | None = None, score: str = "val/accuracy"
    ):
        self._score = score
        self.folder, self.title, self.facts = Path(folder), title, facts or {}
        self.summary: dict[str, Any] = {}
        self._started: float | None = None
        self._before: dict[str, float] = {}  # of the run that this one continues
        self._tokens = 0
        self._train: list[tuple[int, float]] = []
        self._validation: list[dict[str, Any]] = []
        self._curve_written = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += int(batch["attention_mask"].sum())
        # Lightning reports a step's share of the accumulated loss. Manual optimization may report no loss.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._train.append((trainer.global_step, float(loss) * trainer.accumulate_grad_batches))
        if time.monotonic() - self._curve_written > _CURVE_PERIOD:
            self._write_curve(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        logged = trainer.callback_metrics
        names = dict.fromkeys([self._score, "val/loss", *(name for name in logged if name.startswith("val/"))])
        metrics = {name: _rounded(logged[name]) for name in names}
        self._validation.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **metrics})
        self._write_curve(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `on_fit_end`: by then the strategy has closed the connection that counted the bytes.
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        best = self._validation_of(checkpoints[0] if checkpoints else None)
        totals = self._totals(pl_module)
        self.summary = {
            self._score: None,
            "val/loss": None,
            **{name: value for name, value in best.items() if name.startswith("val/")},
            "val/epoch": best.get("epoch"),
            "train/seconds": round(totals["train/seconds"], 2),
            "train/steps": trainer.global_step,
            **{name: int(value) for name, value in totals.items() if name != "train/seconds"},
            "train/parameters": sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad),
            # Linux counts in KiB. Only for this process; servers are other processes.
            "client/peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "checkpoint": (checkpoints[0].best_model_path or None) if checkpoints else None,
            **self.facts,
        }
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a trial, maybe beside the results of a real run
            return
        self._write()
        self._write_curve(trainer)
        picture, beside = self.folder / "learning_curve.png", validation_of_head_alone(self.folder, self.facts)
        draw_learning_curve(picture, self._train, self._validation, self.title, self._score, beside)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.summary |= {name: _rounded(v) for name, v in trainer.callback_metrics.items() if name.startswith("test/")}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Saved in checkpoints, so that a resumed run's summary and plot cover the whole run."""
        before = self._totals(self._module) if self._module is not None else self._before
        return {"totals": before, "train": list(self._train), "validation": list(self._validation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = dict(state_dict["totals"])
        self._tokens = 0
        self._train = [tuple(point) for point in state_dict["train"]]
        self._validation = list(state_dict["validation"])

    _module: pl.LightningModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._module = pl_module

    def _validation_of(self, checkpoint: ModelCheckpoint | None) -> dict[str, Any]:
        """The entry that made `checkpoint` the best; without one, the newest."""
        score = None if checkpoint is None else checkpoint.best_model_score
        matching = [entry for entry in self._validation if score is None or entry[self._score] == _rounded(score)]
        return matching[0 if score is not None else -1] if matching else {}

    def _totals(self, module: pl.LightningModule) -> dict[str, float]:
        now = {
            "train/seconds": time.monotonic() - self._started if self._started is not None else 0.0,
            "train/tokens": self._tokens,
            **traffic_metrics(module),
        }
        return {name: value + self._before.get(name, 0) for name, value in now.items()}

    def _write_curve(self, trainer: pl.Trainer) -> None:
        self._curve_written = time.monotonic()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        curve = {
            "title": self.title,
            "score": self._score,
            "steps": planned_steps(trainer),
            "train": self._train,
            "validation": self._validation,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / f".{CURVE_FILE}"  # whoever reads the curve meanwhile finds the whole of an older one
        written.write_text(json.dumps(curve, ensure_ascii=False) + "\n", encoding="utf-8")
        written.replace(self.folder / CURVE_FILE)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n"
        (self.folder / "summary.json").write_text(text, encoding="utf-8")


def _rounded(metric: torch.Tensor) -> float:
    # float32 has about 7 digits; the further ones would be noise in the file.
    return round(float(metric), 6)
