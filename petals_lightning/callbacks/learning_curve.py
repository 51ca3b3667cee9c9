"""A plot of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draw without a display
from matplotlib.figure import Figure

CURVE_FILE = "learning_curve.json"
"""In a run's folder, while it trains and afterwards: title, score, and the points of the plot."""

TRAIN, VALIDATION, SCORE, HEAD_ALONE = "#9ecae1", "#08519c", "#e6550d", "#969696"


def validation_of_head_alone(folder: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The validation entries of the newest run beside `folder` that trained the head alone, if there is one.

    Args:
        folder: of a run.
        facts: of that run; the other one must agree with it in `recipe`, `model` and `data`.
    """
    for summary in sorted(folder.parent.glob("*/summary.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            other = json.loads(summary.read_text(encoding="utf-8"))
        except ValueError:  # another run is writing it at this moment
            continue
        same = all(other.get(name) == facts.get(name) for name in ("recipe", "model", "data"))
        curve = summary.parent / CURVE_FILE
        if summary.parent != folder and same and other.get("tuning/mode", "") is None and curve.is_file():
            found: list[dict[str, Any]] = json.loads(curve.read_text(encoding="utf-8"))["validation"]
            return found
    return []


def draw_learning_curve(
    path: Path,
    train: Sequence[tuple[int, float]],
    validation: Sequence[dict[str, Any]],
    title: str,
    score: str,
    head_alone: Sequence[dict[str, Any]] = (),
) -> None:
    """Saves a PNG: losses on the left, the validation score on the right, over optimizer steps.

    Args:
        path: the file to write.
        train: (step, training loss).
        validation: entries with `step`, `val/loss` and the score.
        title: title of the plot.
        score: e.g. `val/accuracy`.
        head_alone: entries of a run to compare with, like those of `validation`.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    losses, right = figure.subplots(1, 2, sharex=True)
    figure.suptitle(title, fontsize=11)
    steps, values = [step for step, _ in train], [loss for _, loss in train]
    losses.plot(steps, values, color=TRAIN, linewidth=0.8, label="train, each step")
    if len(values) >= 10:
        losses.plot(steps, _smoothed(values), color=VALIDATION, linewidth=1.8, label="train, moving average")
    at = [entry["step"] for entry in validation]
    losses.plot(at, [entry["val/loss"] for entry in validation], "o-", color=SCORE, label="validation")
    losses.set(xlabel="optimizer step", ylabel="loss", title="loss")
    losses.set_ylim(bottom=0)
    losses.set_xlim(left=0)
    losses.legend(frameon=False)
    name, scores = score.removeprefix("val/"), [entry[score] for entry in validation]
    if head_alone := [entry for entry in head_alone if score in entry]:
        beside = [entry[score] for entry in head_alone]
        right.plot([entry["step"] for entry in head_alone], beside, "o--", color=HEAD_ALONE, label="head alone")
        right.legend(frameon=False)
    right.plot(at, scores, "o-", color=SCORE)
    for step, value in zip(at, scores, strict=True):
        right.annotate(f"{value:.3f}", (step, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    right.set(xlabel="optimizer step", ylabel=name, title=f"validation {name}")
    if name == "accuracy":
        right.set_ylim(min([*scores, *(entry[score] for entry in head_alone), 0.5]) - 0.05, 1.03)
    for axes in (losses, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero (as in Adam)."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed
