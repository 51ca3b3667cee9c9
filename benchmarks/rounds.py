"""What benchmarks share: rounds of several sides that alternate in one run, and the table of what came of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

_WARM_UP = 2
_FILE_WIDTH = 160  # columns, where no terminal says how many there are

Row = tuple[str, float, float]
"""A case, and what was measured of its two sides."""


def alternate(rounds: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each side's round, of those after the warm-up: the machine may be noisy."""
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for repeat in range(repeats + _WARM_UP):
        for name, run in rounds.items():
            elapsed = run()
            if repeat >= _WARM_UP:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(
    title: str, columns: Sequence[str], rows: Sequence[Row], output: Path | None, *, second_by_first: bool = False
) -> None:
    """Prints rows and their ratios, which are first / second unless said otherwise; saves them if a file is given."""
    cells = []
    for case, first, second in rows:
        ratio = second / first if second_by_first else first / second
        cells.append((case, f"{first:.1f}", f"{second:.1f}", f"{ratio:.2f}"))
    print_table(title, ("case", *columns), cells)
    save_rows(rows, output)


def print_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others are numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def save_rows(rows: Sequence[object], output: Path | None) -> None:
    """Writes rows as JSON, if a file is given."""
    if output is not None:
        output.write_text(json.dumps(rows, indent=2) + "\n")
