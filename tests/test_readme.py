"""Every command of the README is one that works: installed and tested by .ci/run, composed by Hydra, or parsed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from petals_lightning.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [command.strip() for block in BLOCKS for line in block.splitlines() for command in line.split("&&")]


def commands_of(program: str) -> list[str]:
    found = [command for command in COMMANDS if command.startswith(program)]
    assert found, f"the README has no command that begins with {program!r}"
    return found


def test_every_command_is_of_a_kind_that_is_checked():
    kinds = "pip install -c constraints.txt -e ", "pytest", "python train.py", "petals-lightning", "python -m"
    assert COMMANDS
    for command in COMMANDS:
        assert command.startswith(kinds), command


def test_ci_installs_and_tests_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    install = '-c constraints.txt -e ".[dev]"'
    assert f"pip install {install}" in commands_of("pip install")
    assert f"install locked {install}\n" in script
    (command,) = commands_of("pytest")
    assert re.search(rf"^timeout .* {command}$", script, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of("python train.py"))
def test_train_commands_compose(command, tmp_path):
    arguments = [argument for argument in shlex.split(command)[2:] if argument not in ("-m", "--multirun")]
    arguments = [argument.split(",")[0] if "[" not in argument else argument for argument in arguments]  # of a sweep
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments, "--cfg", "job"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "tuning:" in result.stdout


@pytest.mark.parametrize("command", commands_of("petals-lightning"))
def test_cli_commands_parse(command):
    name, *arguments = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)  # raises on an option that does not exist


def test_the_linked_files_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
