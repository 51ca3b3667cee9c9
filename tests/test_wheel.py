"""The wheel alone is enough: `petals-lightning train` works in an empty folder, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command in a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since the build leaves files beside what it packs
    others = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "outputs", "multirun", "wandb")
    shutil.copytree(ROOT, source, symlinks=True, ignore=others)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_has_settings_recipes_and_sample_but_no_tools(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for group in ("conf", "recipes"):
        expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / group).rglob("*.yaml")}
        assert {f"petals_lightning/{name}" for name in expected} <= set(names)
    assert any(name.endswith(".safetensors") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"petals_lightning"}


def test_recipe_trains_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    # Only the package is installed from the wheel; what it needs is taken from this environment.
    venv.create(installed, with_pip=False, symlinks=True)
    packages = next(installed.glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel, cwd=tmp_path)
    (packages / "zz_libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    program: list[str | Path] = [installed / "bin" / "python", "-m", "petals_lightning.cli.main", "train"]

    origin = run(
        installed / "bin" / "python", "-c", "import petals_lightning; print(petals_lightning.__file__)", cwd=empty
    )
    assert Path(origin.strip()).is_relative_to(packages), "the wheel is imported, not the repository"
    assert "petals-lightning train recipe=sst2_deep_ptune" in run(*program, cwd=empty)

    recipes = tmp_path / "mine" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "brief.yaml").write_text(
        "# @package _global_\ndefaults:\n  - sst2_deep_ptune\n\ntrainer:\n  max_steps: 2\n  limit_val_batches: 1\n"
    )
    output = run(*program, "--config-dir", recipes.parent, "recipe=brief", "logger=csv", "test=false", cwd=empty)
    folder = next((empty / "outputs" / "brief").iterdir())
    assert (folder / "summary.json").is_file(), output
    assert (folder / "learning_curve.png").is_file(), output
