"""Sweeps by Hydra's Optuna sweeper and by W&B's agent, from the files that the README names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.helpers.wandb_files import read_wandb_history, read_wandb_summary

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["swarm=none", "data.batch_size=8", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]


def petals_lightning(arguments: list[str], folder: Path, **environment: str) -> str:
    """Runs `petals-lightning …` in a folder; returns what it prints."""
    program = [sys.executable, "-m", "petals_lightning.cli.main"]
    done = subprocess.run(
        [*program, *arguments], cwd=folder, env=os.environ | environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_optuna_chooses_the_settings(text_model: Path, texts: Path, tmp_path: Path) -> None:
    said = petals_lightning(
        ["train", "-m", "recipe=sst2_deep_ptune", "+sweep=optuna", f"model.name={text_model}", f"data.source={texts}",
         "logger=csv", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=sweep", *QUICK],
        tmp_path,
    )  # fmt: skip
    found: Any = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    runs: list[Any] = [OmegaConf.load(path) for path in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    assert len(runs) == 3
    assert found.best_value == max(run["val/accuracy"] for run in runs)
    tried: list[Any] = [OmegaConf.load(path) for path in (tmp_path / "sweep").glob("*/.hydra/config.yaml")]
    assert len({run.optim.lr for run in tried}) == 3
    assert {found.best_params["optim.lr"]} <= {run.optim.lr for run in tried}
    assert all(1e-3 <= run.optim.head_lr <= 1e-1 and run.tuning.pre_seq_len in (8, 16, 32) for run in tried)
    assert "Best parameters" in said


@pytest.mark.slow
def test_a_run_that_an_agent_of_wandb_starts_is_its_run(text_model: Path, texts: Path, tmp_path: Path) -> None:
    """The agent itself needs W&B's server. The command and the environment are those that it makes."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "recipes" / "sweeps" / "wandb.yaml").read_text())
    chosen = {
        name: {"value": each.get("value", each.get("values", [each.get("min")])[0])}
        for name, each in sweep["parameters"].items()
    }
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = create_sweep_command(sweep["command"])
    assert command == ["${program}", "train", "${args_no_hyphens}"]
    said = petals_lightning(
        ["train", *arguments, f"model.name={text_model}", f"data.source={texts}", "hydra.run.dir=run", *QUICK],
        tmp_path, WANDB_MODE="offline", WANDB_SWEEP_ID="s1", WANDB_RUN_ID="agents-run",
    )  # fmt: skip
    assert "Ignoring" not in said
    (path,) = tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")
    assert path.stem == "run-agents-run"
    assert (tmp_path / "run" / "wandb" / "run_id").read_text().strip() == "agents-run", "to continue it later"
    history = [row[sweep["metric"]["name"]] for row in read_wandb_history(path) if "val/accuracy" in row]
    best: Any = OmegaConf.load(tmp_path / "run" / "summary.json")
    assert read_wandb_summary(path)["val/accuracy"] == best["val/accuracy"] == pytest.approx(max(history), abs=1e-6)
