"""Recipes: short diffs against conf/, in recipes/*.yaml, each headed by the command that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console

from petals_lightning.errors import ConfigurationError

_PROGRAM = "python train.py"  # as recipes have it


@dataclass(frozen=True)
class Recipe:
    """One file in recipes/."""

    name: str
    about: str
    """Its purpose: the header's lines without the command."""
    command: str
    path: Path


def find_recipes(folder: Path) -> list[Recipe]:
    """The recipes of a folder, by name.

    Raises:
        ConfigurationError: there are none, or one lacks its header.
    """
    recipes = [_read(path) for path in sorted(folder.glob("*.yaml"))]
    if not recipes:
        raise ConfigurationError(f"no recipes in {folder}")
    return recipes


def register_recipes(recipes: list[Recipe]) -> None:
    """Makes each recipe an option of Hydra's group `recipe`, which a folder called recipes/ is not by itself."""
    for recipe in recipes:
        ConfigStore.instance().store(
            recipe.name,
            OmegaConf.load(recipe.path),
            group="recipe",
            package="_global_",
            provider=str(recipe.path),
        )


def print_recipes(recipes: list[Recipe], program: str) -> None:
    """Prints every recipe: its name, its purpose, and the command to copy, which begins with `program`."""
    console = Console()
    console.print("[bold]recipes[/bold] (settings: conf/, measured results: recipes/README.md)\n")
    for recipe in recipes:
        console.print(f"[bold cyan]{recipe.name}[/bold cyan]  {recipe.about}")
        # Commands are for copying: never wrapped, never coloured.
        command = recipe.command.replace(_PROGRAM, program, 1)
        console.print(f"    {command}\n", soft_wrap=True, highlight=False, markup=False)
    console.print(
        "Any setting can be overridden: tuning.pre_seq_len=8 optim.lr=3e-3 model=llama3_8b swarm=private …\n"
        "Several values make a sweep: -m tuning.pre_seq_len=8,16",
        highlight=False,
    )


def _read(path: Path) -> Recipe:
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("#").strip())
    commands = [line for line in header if line.startswith(_PROGRAM)]
    about = " ".join(line for line in header if line and line not in commands)
    if not commands or not about:
        raise ConfigurationError(f"{path} must begin with comments: what it does, and its `{_PROGRAM} …` command")
    return Recipe(path.stem, about, commands[0], path)
