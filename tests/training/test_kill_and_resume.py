"""`kill -9` of the trainer at any step: the resumed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 15


def start(folder: Path, losses: Path, moment: str, model: Path, texts: Path, *overrides: str) -> int:
    command = [
        sys.executable, "-m", "tests.training.killed_run", str(losses), moment, "recipe=sst2_deep_ptune",
        f"model.name={model}", f"data.source={texts}", "swarm=none", "logger=csv", "data.batch_size=8", "test=false",
        "tuning.pre_seq_len=3", "trainer.max_epochs=3", "checkpoint_period=1e-3", f"hydra.run.dir={folder}", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")  # shown where a test fails
    return done.returncode


def read(losses: Path) -> list[tuple[int, str]]:
    return [(int(step), loss) for step, loss in (line.split() for line in losses.read_text().splitlines())]


@pytest.fixture(scope="module")
def undisturbed(text_model, texts, tmp_path_factory) -> tuple[dict[int, str], dict]:
    """The losses by step, and the summary, of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, folder / "losses.txt", "never", text_model, texts) == 0
    losses = dict(read(folder / "losses.txt"))
    assert len(losses) == STEPS
    return losses, json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("kills", ["at random", "after 5, fail 7, validation 10, after 12"])
def test_runs_killed_at_any_moment_resume_to_the_undisturbed_losses(kills, undisturbed, text_model, texts, tmp_path):
    losses, summary = undisturbed
    if kills == "at random":
        chosen = sorted(random.Random().sample(range(2, STEPS), 3))
        moments = [f"{random.choice(['after', 'before'])} {step}" for step in chosen]
    else:
        moments = kills.split(", ")
    parts, folder = tmp_path / "parts.txt", tmp_path / "parts"
    for number, moment in enumerate([*moments, "never"]):
        code = start(folder, parts, moment, text_model, texts, f"resume={str(number > 0).lower()}")
        assert code == (0 if moment == "never" else 1 if moment.startswith("fail") else -signal.SIGKILL), moments
    trained = read(parts)
    assert {step for step, _ in trained} == set(losses), moments
    assert len(trained) <= STEPS + 2 * len(moments), "it went back further than the last checkpoint"
    for step, loss in trained:
        assert loss == losses[step], f"step {step}; {moments}"
    resumed = json.loads((folder / "summary.json").read_text())
    assert resumed["val/loss"] == summary["val/loss"], moments


def test_a_run_with_lora_resumes_too(text_model, texts, tmp_path):
    """Killed in an epoch; the losses after it, and the adapter, are those of a run that nothing happened to."""
    tuning = ("tuning=lora", "tuning.r=2", "trainer.max_epochs=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, tmp_path / "whole.txt", "never", text_model, texts, *tuning) == 0
    assert start(parts, tmp_path / "parts.txt", "after 7", text_model, texts, *tuning) == -signal.SIGKILL
    assert start(parts, tmp_path / "parts.txt", "never", text_model, texts, *tuning, "resume=true") == 0
    losses = dict(read(tmp_path / "whole.txt"))
    for step, loss in read(tmp_path / "parts.txt"):
        assert loss == losses[step], step
    saved = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, parts)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(saved[1][name], tensor), name
