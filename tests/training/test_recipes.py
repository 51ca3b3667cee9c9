"""Every recipe and every option of conf/ makes a run; the table of recipes is complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from petals_lightning.errors import ConfigurationError
from petals_lightning.training.recipes import find_recipes
from petals_lightning.training.run import build_module, build_trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPES = find_recipes(ROOT / "recipes")  # raises if there are none
GROUPS = ("model", "swarm", "tuning", "amp", "task", "data", "optim", "trainer", "logger")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
NEEDED = {
    ("task", "verbalized_classification"): ["task.verbalizer={0: no, 1: yes}"],
    ("task", "distillation"): ["task.teacher=some/model"],
    ("data", "local"): ["data.source=some/folder"],
    ("swarm", "private"): ["swarm.initial_peers=[/ip4/127.0.0.1/tcp/31337/p2p/12D3Koo]"],
}


def build(overrides: list[str], folder: Path) -> None:
    """Composes a run and builds its objects, which read no data and start nothing."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*overrides, f"output_dir={folder}"])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    swarm = instantiate(cfg.swarm, _convert_="all") if "_target_" in cfg.swarm else None
    build_module(cfg, SimpleNamespace(num_labels=2, class_names=("no", "yes")))
    trainer = build_trainer(cfg, folder, swarm, logger=None, summary=None)
    assert (trainer.strategy.strategy_name == "remote_blocks") == (swarm is not None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_builds_with_the_command_in_its_header(recipe, tmp_path: Path) -> None:
    overrides = [word.replace("PATH", "some/folder") for word in recipe.command.split()[2:]]
    assert f"recipe={recipe.name}" in overrides
    build(overrides, tmp_path)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="/".join)
def test_every_option_builds(group: str, option: str, tmp_path: Path) -> None:
    build(["recipe=sst2_deep_ptune", f"{group}={option}", *NEEDED.get((group, option), [])], tmp_path)


def test_every_recipe_has_its_row_in_the_table_of_results() -> None:
    table = (ROOT / "recipes" / "README.md").read_text()
    for recipe in RECIPES:
        assert f"| `{recipe.name}`" in table


def test_every_group_has_options() -> None:
    assert {group for group, _ in OPTIONS} == set(GROUPS)


def test_a_folder_without_recipes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no recipes in"):
        find_recipes(tmp_path)


def test_a_recipe_without_its_command_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("# does something\nseed: 1\n")
    with pytest.raises(ConfigurationError, match=r"bare\.yaml must begin with comments"):
        find_recipes(tmp_path)


def test_train_without_arguments_lists_the_recipes(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, ROOT / "train.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for recipe in RECIPES:
        assert recipe.command.replace("train.py", str(ROOT / "train.py")) in result.stdout
    assert not list(tmp_path.iterdir()), "listing leaves nothing behind"
