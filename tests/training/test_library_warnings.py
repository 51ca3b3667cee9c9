"""What other libraries warn of is in the log of a run and not on the user's screen; our own notices are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from petals_lightning.strategies.server_process import ServerProcess, launch
from tests.helpers.text_models import save_tiny_text_model
from tools.testing.swarms import LOOPBACK, PREFIX, InProcessSwarm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-m", "petals_lightning.cli.main"]

# Python imports it when it starts. Libraries then seem to warn while they are imported, and in their log at the end.
SITE = """
import atexit, logging, sys, warnings

class Warns:
    def find_spec(name, path=None, target=None):
        if name in ("hydra", "typer", "torch", "transformers"):
            warnings.warn(f"the old {name} goes away", FutureWarning)
            warnings.warn(f"the older {name} went away", DeprecationWarning)

sys.meta_path.insert(0, Warns)
atexit.register(lambda: logging.getLogger("transformers.modeling").warning("a word of the library's log"))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONWARN")}
    return kept | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}


def assert_is_kept_off_the_screen(screen: str) -> None:
    for words in ("goes away", "went away", "library's log", "Warning"):
        assert words not in screen, screen


def test_a_run_and_its_servers(text_model: Path, texts: Path, environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "recipe=sst2_ptune", "logger=csv", "trainer.max_epochs=1"]
    command += [f"model.name={text_model}", f"data.source={texts}", f"hydra.run.dir={folder}", "data.batch_size=8"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "val/accuracy" in done.stdout
    assert_is_kept_off_the_screen(done.stdout + done.stderr)
    log = (folder / "train.log").read_text()
    for library in ("hydra", "torch", "transformers"):
        assert f"FutureWarning: the old {library} goes away (" in log
        assert f"DeprecationWarning: the older {library} went away (" in log
    assert "a word of the library's log" in log
    for server in ("server_0.log", "server_1.log"):
        log = (folder / "servers" / server).read_text()
        assert "FutureWarning: the old transformers goes away (" in log
        assert "a word of the library's log" in log


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_client_in_a_terminal(
    command: str, environment: dict[str, str], start_swarm: Callable[..., InProcessSwarm], tmp_path: Path
) -> None:
    folder = save_tiny_text_model(tmp_path / "model")
    swarm = start_swarm(folder, [(0, 4)])
    arguments = [command, str(folder), "--dht-prefix", PREFIX, "--initial-peers", swarm.initial_peers[0]]
    done = subprocess.run(
        [*CLI, *arguments, "--max-new-tokens", "2"],
        env=environment, input="w1 w2", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr == ""


def test_a_server_in_a_terminal(tiny_checkpoint: Callable[[str], Path], environment: dict[str, str]) -> None:
    arguments = ["serve", str(tiny_checkpoint("llama")), "--new-swarm", "--dht-prefix", PREFIX, "--threads", "1"]
    command = launch([*arguments, "--host-maddrs", *LOOPBACK], env=environment)
    server = ServerProcess(command, "a server in a terminal").start()
    try:
        server.wait_until_ready()
        server.signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.stop()
    screen = "".join(server.lines)
    assert "leaving" in screen
    assert_is_kept_off_the_screen(screen)
