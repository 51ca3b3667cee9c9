"""The command line of the generators: rows of splits to jsonl files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Splits = Mapping[str, list[dict[str, Any]]]


def write_splits(splits: Splits, output_dir: Path) -> None:
    """Writes `<split>.jsonl` files, a row a line, to `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_from_command_line(description: str, make: Callable[[int], Splits], output_dir: Path, seed: int) -> None:
    """Parses `--output-dir` and `--seed`, whose defaults are given, and writes what `make(seed)` makes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=output_dir)
    parser.add_argument("--seed", type=int, default=seed)
    args = parser.parse_args()
    write_splits(make(args.seed), args.output_dir)
