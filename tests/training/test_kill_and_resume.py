"""`kill -9` of the trainer at random steps: what is resumed goes on as if nothing had been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

STEPS = 15


def start(folder: Path, losses: Path, step: int, model: Path, texts: Path, *overrides: str) -> int:
    command = [
        sys.executable, "-m", "tests.training.killed_run", str(losses), str(step), "recipe=sst2_deep_ptune",
        f"model.name={model}", f"data.source={texts}", "swarm=none", "logger=csv", "data.batch_size=8", "test=false",
        "tuning.pre_seq_len=3", "trainer.max_epochs=3", "checkpoint_period=1e-3", f"output_dir={folder}", *overrides,
    ]  # fmt: skip
    return subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True).returncode


def read(losses: Path) -> list[tuple[int, str]]:
    return [(int(step), loss) for step, loss in (line.split() for line in losses.read_text().splitlines())]


def test_runs_killed_at_random_steps_resume_to_the_undisturbed_losses(text_model, texts, tmp_path):
    whole = tmp_path / "whole.txt"
    assert start(tmp_path / "whole", whole, -1, text_model, texts) == 0
    undisturbed = dict(read(whole))
    assert len(undisturbed) == STEPS
    kills = sorted(random.Random().sample(range(2, STEPS), 2))
    parts, folder = tmp_path / "parts.txt", tmp_path / "parts"
    for number, step in enumerate([*kills, -1]):
        code = start(folder, parts, step, text_model, texts, f"resume={str(number > 0).lower()}")
        assert code == (-signal.SIGKILL if step > 0 else 0), f"killed at {kills}"
    trained = read(parts)
    assert {step for step, _ in trained} == set(undisturbed)
    assert len(trained) <= STEPS + 2 * len(kills), "it went back further than the last checkpoint"
    for step, loss in trained:
        assert loss == undisturbed[step], f"step {step}; killed at {kills}"
