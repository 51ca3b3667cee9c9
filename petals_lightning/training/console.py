"""What a run prints at its start and end."""

from __future__ import annotations

import json
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
from petals_lightning.strategies import ServedModel
from petals_lightning.training.command_line import command, program
from petals_lightning.training.run_folder import LAST_CHECKPOINT

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


def print_next_steps(cfg: DictConfig, model: ServedModel, folder: Path) -> None:
    """Prints, after a run, the commands that use what it has left, compare it, and train it on."""
    lines: list[tuple[str, str]] = []
    name = [model.name_or_path, *(["--dht-prefix", model.dht_prefix] if model.dht_prefix is not None else [])]
    tuned = [part for part in ("prompts", "adapter") if _is_for_text(folder / part)]
    if tuned:
        peers = cfg.swarm.get("initial_peers")
        if not peers and "PublicSwarm" in str(cfg.swarm.get("_target_")):
            join = ["--public"]
        elif peers:
            join = ["--initial-peers", *peers]
        else:
            lines.append(("serve the blocks (it prints its address)", _joined("serve", *name, "--new-swarm")))
            join = ["--initial-peers", _MADDR]
        use = [word for part in tuned for word in (f"--{part}", str(folder / part))]
        lines.append(("talk to the model", _joined("chat", *name, *use, *join)))
        served = [word for part in tuned for word in (f"--{part}", f"tuned={folder / part}")]
        lines.append(("for other programs (OpenAI's API)", _joined("api", *name, *served, *join)))
    other = {None: "deep_ptune", "deep_ptune": "ptune"}.get(cfg.tuning.mode, "deep_ptune")
    if not tuned and cfg.tuning.mode is not None:
        other = "none"  # a classifier's head
    lines.append((f"compare with tuning={other}", command(f"tuning={other}")))
    if (folder / LAST_CHECKPOINT).is_file() and (cfg.trainer.max_epochs or 0) > 0:
        epochs = f"trainer.max_epochs={2 * cfg.trainer.max_epochs}"
        lines.append(("train on", command(f"ckpt_path={folder / LAST_CHECKPOINT}", "resume=false", epochs)))
    console = get_console()
    console.print("next:", highlight=False)
    for what, line in lines:
        console.print(f"  {what}:\n    {line}", soft_wrap=True, highlight=False, markup=False)


def _is_for_text(tuned: Path) -> bool:
    """Whether a folder holds what was tuned for a language model, and not for a classifier."""
    if not tuned.is_dir():
        return False
    config = tuned / "adapter_config.json"
    return not config.is_file() or json.loads(config.read_text(encoding="utf-8"))["task_type"] == "CAUSAL_LM"


def _joined(*words: str) -> str:
    return shlex.join(["petals-lightning", *words])


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
