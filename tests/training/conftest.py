from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from petals_lightning.training.recipes import find_recipes, register_recipes
from petals_lightning.training.resolvers import register_resolvers
from petals_lightning.training.schema import register_schema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def known_to_hydra() -> None:
    """What train.py tells Hydra before it starts."""
    register_schema()
    register_recipes(find_recipes(ROOT / "recipes"))
    register_resolvers()


@pytest.fixture
def compose_run(text_model: Path, texts: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """`compose_run("optim.lr=1", …)`: the settings of a quick local run of sst2_deep_ptune."""

    def compose_run(*overrides: str, recipe: str = "sst2_deep_ptune") -> DictConfig:
        quick = [f"model.name={text_model}", f"data.source={texts}", "swarm=none", "logger=csv", "data.batch_size=8"]
        quick += [
            "tuning.pre_seq_len=3",
            "trainer.max_epochs=2",
            "trainer.log_every_n_steps=1",
            f"output_dir={tmp_path}",
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", [f"recipe={recipe}", *quick, *overrides])

    return compose_run
