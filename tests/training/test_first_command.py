"""The README's first command, as a user runs it: it learns through real servers, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "train.py"), "recipe=sst2_deep_ptune"]
SHORT = ("trainer.max_epochs=2", "trainer.limit_train_batches=30", "trainer.limit_val_batches=5", "logger=csv")
"""A run of 60 steps, instead of 189: long enough to be in the middle of it, twice."""
MARK = "PETALS_LIGHTNING_TEST_RUN"


class TrainProcess:
    """train.py in a folder of its own, with a mark that all its descendants inherit."""

    def __init__(self, folder: Path, *overrides: str):
        self.mark, self.folder = uuid.uuid4().hex, folder
        self.log = folder / f"{self.mark}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *overrides],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {MARK: self.mark, "NETRC": str(folder / "no-netrc")},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = 120.0) -> None:
        """Returns when `text` has been printed."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        """Every live process that this run has started, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_is_left(self, within: float = 10.0) -> None:
        deadline = time.monotonic() + within
        while left := self.descendants():
            assert time.monotonic() < deadline, [" ".join(process.cmdline()) for process in left]
            time.sleep(0.2)


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., TrainProcess]]:
    started: list[TrainProcess] = []

    def start(*overrides: str) -> TrainProcess:
        started.append(TrainProcess(tmp_path, *overrides))
        return started[-1]

    yield start
    for run in started:
        for process in run.descendants():
            process.kill()
        run.process.wait()


def test_it_learns_through_two_servers_and_leaves_nothing_running(
    train: Callable[..., TrainProcess], tmp_path: Path
) -> None:
    run = train()
    run.wait_for("local-1")
    assert run.process.wait(timeout=180) == 0, run.output
    run.assert_nothing_is_left()
    assert "This is the bundled sample" in run.output
    assert "swarm.initial_peers=[/ip4/" in run.output, "the command for the real thing"
    (path,) = tmp_path.glob("outputs/sst2_deep_ptune/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["val/accuracy"] >= 0.90
    assert summary["swarm/bytes_sent"] > 1e6
    assert summary["swarm/retries"] == 0
    assert Path(summary["checkpoint"]).stat().st_size < 200_000
    assert {"servers", "wandb", "checkpoints", "learning_curve.png", "test_report.txt"} <= {
        entry.name for entry in path.parent.iterdir()
    }


def test_ctrl_c_saves_and_resume_continues(train: Callable[..., TrainProcess], tmp_path: Path) -> None:
    run = train(*SHORT)
    run.wait_for("val/loss")  # the first epoch is over
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert run.process.wait(timeout=30) == 130, run.output
    run.assert_nothing_is_left()
    assert "last.ckpt. Continue with:" in run.output
    resumed = train(*SHORT, "resume=true", "test=false")
    assert resumed.process.wait(timeout=120) == 0, resumed.output
    (path,) = tmp_path.glob("outputs/sst2_deep_ptune/*/summary.json")
    assert json.loads(path.read_text())["train/steps"] == 60
    assert "epoch 1/2" not in resumed.output, "it began again"


def test_kill_9_takes_the_servers_along(train: Callable[..., TrainProcess]) -> None:
    run = train(*SHORT)
    run.wait_for("epoch 1/")
    assert len(run.descendants()) > 3, "train.py, servers and their daemons"
    run.process.kill()
    run.process.wait()
    run.assert_nothing_is_left()


def test_ctrl_c_while_servers_start_leaves_nothing_running(train: Callable[..., TrainProcess]) -> None:
    run = train("logger=csv")
    run.wait_for("bundled sample")
    while len(run.descendants()) < 2:
        time.sleep(0.05)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(timeout=30) == 130, run.output
    run.assert_nothing_is_left()
