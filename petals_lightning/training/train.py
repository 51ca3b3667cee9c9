"""`python train.py …` and `petals-lightning train …`: one program, whose arguments are Hydra's."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from petals_lightning.training.cli_errors import one_line_errors
from petals_lightning.training.command_line import program
from petals_lightning.training.recipes import find_recipes, print_recipes, register_recipes
from petals_lightning.training.resolvers import register_resolvers
from petals_lightning.training.schema import register_schema

_DRY_RUN = "dry_run=true"  # Hydra takes no options but its own

PACKAGE = Path(__file__).resolve().parents[1]
"""Its conf/ and recipes/ are links to those of the repository, and copies of them in a wheel."""


def main() -> None:
    """Trains the recipe that the command line names, or lists the recipes if it names nothing."""
    with one_line_errors():
        recipes = find_recipes(PACKAGE / "recipes")
        if len(sys.argv) == 1:
            print_recipes(recipes, program())
            return
        sys.argv = [_DRY_RUN if argument == "--dry-run" else argument for argument in sys.argv]
        register_schema()
        register_recipes(recipes)
        register_resolvers()
        _train()


@hydra.main(version_base="1.3", config_path=str(PACKAGE / "conf"), config_name="config")
def _train(cfg: DictConfig) -> float | None:
    """Runs one job; its validation accuracy is what a sweeper optimises."""
    with one_line_errors(cfg):
        from petals_lightning.training.run import run  # imports torch, which `--cfg job` can do without

        return run(cfg, str(HydraConfig.get().runtime.choices["recipe"]))
