"""Trains a recipe: `python train.py recipe=sst2_deep_ptune`. Without arguments it lists the recipes.

Settings are in conf/ (`python train.py recipe=… --cfg job` shows them all), recipes in recipes/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Servers, guard and client share the cores: spinning OpenMP threads would take them from each other. Set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from petals_lightning.library_messages import warnings_to_log

ROOT = Path(__file__).resolve().parent


def main() -> None:
    warnings_to_log()  # before libraries are imported, which may warn

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from petals_lightning.training.cli_errors import one_line_errors
    from petals_lightning.training.recipes import find_recipes, print_recipes, register_recipes
    from petals_lightning.training.resolvers import register_resolvers
    from petals_lightning.training.schema import register_schema

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
    def train(cfg: DictConfig) -> float | None:
        """Runs one job; its validation accuracy is what a sweeper optimises."""
        with one_line_errors(cfg):
            from petals_lightning.training.run import run

            return run(cfg, str(HydraConfig.get().runtime.choices["recipe"]))

    with one_line_errors():
        recipes = find_recipes(ROOT / "recipes")
        if len(sys.argv) == 1:
            print_recipes(recipes)
            return
        register_schema()
        register_recipes(recipes)
        register_resolvers()
        train()


if __name__ == "__main__":
    main()
