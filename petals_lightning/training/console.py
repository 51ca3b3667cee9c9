"""What a run prints at its start and end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich import get_console
from rich.table import Table

from petals_lightning.data import TextDataModule
from petals_lightning.data.sources import BUNDLED
from petals_lightning.sample import MODEL_DIR
from petals_lightning.training.command_line import command, program

_REAL_THING = "{program} recipe={recipe} model=llama3_8b {data} swarm=private 'swarm.initial_peers=[{maddr}]'"
_FILES = "summary.json", "learning_curve.png", "prompts", "adapter", "checkpoints", "fit-profile.txt"
_MADDR = "/ip4/HOST/tcp/PORT/p2p/ID"


def announce(cfg: DictConfig, recipe: str, data: TextDataModule) -> None:
    """Prints what is about to run, and says so if it is only the bundled sample."""
    console = get_console()
    sizes = ", ".join(f"{count:,} {split}" for split, count in data.sizes.items())
    console.rule(f"[bold]{recipe}[/bold]")
    console.print(
        f"model  {cfg.model.name}\ndata   {data.source}: {sizes}; {data.description}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if _is_sample(cfg):
        console.print(
            f"\n[bold yellow]This is the bundled sample:[/bold yellow] a toy language model and synthetic "
            f"{data.bundled_texts},\nto see that everything works. The real thing, with your own swarm:"
        )
        real = _REAL_THING.format(program=program(), recipe=recipe, data=data.real_data, maddr=_MADDR)
        console.print(f"    {real}\n", soft_wrap=True, highlight=False, markup=False)


def print_results(summary: dict[str, Any], folder: Path) -> None:
    """Prints a short table of the results, and where the files are."""
    table = Table(show_header=False, title="results", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for label, value in _rows(summary):
        table.add_row(label, value)
    console = get_console()
    console.print(table)
    files = [path.name for path in map(folder.joinpath, _FILES) if path.exists()]
    console.print(
        f"files: {folder}  ({', '.join(files)})"
        if files
        else "no files are left: this was a trial, or nothing was trained",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def print_interrupted(checkpoint: Path) -> None:
    """Prints, after Ctrl-C, what was saved and how to continue."""
    if checkpoint.is_file():
        print(f"interrupted; saved {checkpoint}. {_how_to_continue(checkpoint)}", file=sys.stderr)
    else:
        print("interrupted before the first step; nothing to save", file=sys.stderr)


def print_failed(checkpoint: Path) -> None:
    """Prints, when the swarm has failed in training, what was saved and how to continue. The error itself follows."""
    if checkpoint.is_file():
        print(f"the swarm failed; saved {checkpoint}. {_how_to_continue(checkpoint)}", file=sys.stderr)


def _how_to_continue(checkpoint: Path) -> str:
    return f"Continue with:\n    {command()} {shlex.quote(f'ckpt_path={checkpoint}')}"


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    scores = [name for name in summary if name.startswith(("val/", "test/")) and name != "val/epoch"]
    formats = {name: "{:.3f}" if name.endswith("perplexity") else "{:.4f}" for name in scores}
    formats |= {
        "train/seconds": "{:,.1f}",
        "train/steps": "{:,}",
        "train/tokens": "{:,}",
        "swarm/bytes_sent": "{:,}",
        "swarm/bytes_received": "{:,}",
        "swarm/retries": "{:,}",
    }
    return [(name, form.format(summary[name])) for name, form in formats.items() if summary.get(name) is not None]


def _is_sample(cfg: DictConfig) -> bool:
    return cfg.data.source == BUNDLED or Path(cfg.model.name) == MODEL_DIR
