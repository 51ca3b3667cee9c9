"""What loggers get of a run: metrics, settings, and what was tuned."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from omegaconf import DictConfig

from petals_lightning.training.run import run
from tests.helpers.wandb_files import read_wandb, read_wandb_history


def test_csv_logs_hold_the_metrics(compose_run: Callable[..., DictConfig], tmp_path: Path) -> None:
    run(compose_run())
    with open(tmp_path / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "train/lr", "train/tokens_per_second", "swarm/bytes_sent", "val/loss", "val/accuracy"):
        assert any(row[name] for row in rows), name
    settings = (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()
    assert "pre_seq_len:" in settings
    assert "batch_size:" in settings, "of the data, which the module does not know"


@pytest.mark.slow
def test_wandb_logs_offline_into_the_run_folder(
    compose_run: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No login on this "machine": W&B must neither ask nor wait.
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    accuracy = run(compose_run("logger=wandb"))
    wandb.teardown()  # its service writes the last of the file when it ends, as it does when train.py does
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history = read_wandb_history(path)
    assert max(row["val/accuracy"] for row in history if "val/accuracy" in row) == pytest.approx(accuracy, abs=1e-6)
    for name in ("train/loss", "train/lr", "train/tokens_per_second", "swarm/bytes_received", "swarm/retries"):
        assert any(name in row for row in history), name


@pytest.mark.slow
def test_what_was_tuned_is_logged_as_an_artifact_with_its_card(
    compose_run: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    short = "data.source=bundled", "data.limit=20", "trainer.max_epochs=1"
    run(compose_run("logger=wandb", *short, recipe="dialogue_deep_ptune"), recipe="mine")
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (artifact,) = [record.artifact for record in read_wandb(path) if record.HasField("artifact")]
    assert (artifact.name, artifact.type) == ("mine-prompts", "prompts")
    assert set(artifact.aliases) == {"latest", "best"}
    assert artifact.description == (tmp_path / "prompts" / "README.md").read_text()
    assert json.loads(artifact.metadata)["val/perplexity"] > 1
    stored = {entry.path for entry in artifact.manifest.contents}
    assert {path.name for path in (tmp_path / "prompts").iterdir()} == stored


@pytest.mark.slow
def test_a_continued_run_goes_on_in_the_same_wandb_run(
    compose_run: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    quick = ("logger=wandb", "test=false", "trainer.max_epochs=1")
    run(compose_run(*quick))
    run(compose_run(*quick, "resume=true", "trainer.max_epochs=2"))
    wandb.teardown()
    first, second = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert first == second
    steps = [row["trainer/global_step"] for path in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
             for row in read_wandb_history(path) if "train/loss" in row]  # fmt: skip
    assert steps == list(range(10))
    run(compose_run(*quick))  # a new run, even in this folder
    wandb.teardown()
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 2
