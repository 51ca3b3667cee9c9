"""Tables and a picture of what `benchmarks.quality` has run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.rounds import print_table

Row = dict[str, Any]
"""A run: the fields of `quality.Case` and what came of it."""

SCORES = ("accuracy", "macro_f1", "matthews", "perplexity")
_SIZE = ("model", "set", "shots", "steps", "batch_size", "limit", "dtype", "servers", "quant_type")
"""Fields of which all runs of a table have the same."""
_SETTINGS = ("pre_seq_len", "lr", "head_lr", "deep_lr", "clip")


def print_rows(rows: Sequence[Row]) -> None:
    """A table for each set and size of runs: means over seeds, with the range in brackets."""
    for own in _grouped(rows, _SIZE):
        varied = [name for name in _SETTINGS if len({row[name] for row in own}) > 1]
        scores = [score for score in SCORES if score in own[0]]
        cells = [
            (
                _title(group[0]),
                *(str(group[0][name]) for name in varied),
                *(_mean(score, group) for score in scores),
                f"{group[0]['parameters']:,}",
                str(len(group)),
                f"{statistics.mean(row['seconds'] for row in group):.0f}",
            )
            for group in _grouped(own, ("method", "start", *_SETTINGS))
        ]
        columns = ("method and start", *varied, *scores, "parameters", "seeds", "seconds")
        print_table(_in_words(own[0]), columns, cells)


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Saves a PNG of SST-2, a dot a run: accuracy with all labels, and over the number of labels of each class.

    Of runs in one process on the whole validation set. Where they have several sizes with the same number of labels,
    those of the size with most runs are drawn.
    """
    scored = [row for row in rows if (row["set"], row["limit"], row["servers"]) == ("sst2", 0, 0)]
    by_labels = {
        own[0]["shots"] or math.inf: max(_grouped(own, _SIZE), key=len) for own in _grouped(scored, ("shots",))
    }
    labels = sorted(by_labels)
    titles = sorted({_title(row) for own in by_labels.values() for row in own})
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_title = {_title(own[0]): own for own in _grouped(by_labels.get(math.inf, ()), ("method", "start"))}
    ordered = sorted(by_title, key=lambda title: _average(by_title[title]))
    for place, title in enumerate(ordered):
        colour = f"C{titles.index(title)}"
        left.plot([place] * len(by_title[title]), [row["accuracy"] for row in by_title[title]], "o", color=colour)
        left.hlines(_average(by_title[title]), place - 0.3, place + 0.3, color=colour)
    left.set_xticks(range(len(ordered)), [title.replace(" ", "\n") for title in ordered], fontsize=8)
    left.set(title="all labels", ylabel="accuracy on validation")
    for number, title in enumerate(titles):
        groups = {count: [row for row in by_labels[count] if _title(row) == title] for count in labels}
        groups = {count: group for count, group in groups.items() if group}
        if len(groups) < 2:
            continue
        right.plot([labels.index(at) for at in groups], list(map(_average, groups.values())), f"C{number}", label=title)
        for count, group in groups.items():
            right.plot([labels.index(count)] * len(group), [row["accuracy"] for row in group], "o", color=f"C{number}")
    right.set_xticks(range(len(labels)), ["all" if count == math.inf else str(count) for count in labels])
    right.set(title="few labels", xlabel="labels of each class")
    if right.lines:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path)


def _grouped(rows: Iterable[Row], fields: Sequence[str]) -> Iterator[list[Row]]:
    """Rows that agree in `fields`, in the order of their first ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    yield from groups.values()


def _title(row: Row) -> str:
    return " ".join(filter(None, (row["method"], row["start"])))


def _in_words(row: Row) -> str:
    """The size of a run."""
    labels = f"{row['shots']} labels of each class" if row["shots"] else "all labels"
    parts = [f"{row['steps']} steps of {row['batch_size']}", labels, row["dtype"]]
    if row["limit"]:
        parts.append(f"{row['limit']} texts of validation")
    if row["servers"]:
        parts.append(f"servers: {row['servers']}, weights: {row['quant_type']}")
    return f"{row['set']}, {Path(row['model']).name}: {', '.join(parts)}"


def _average(rows: Sequence[Row]) -> float:
    return statistics.mean(row["accuracy"] for row in rows)


def _mean(score: str, rows: Sequence[Row]) -> str:
    values = [row[score] for row in rows]
    spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
