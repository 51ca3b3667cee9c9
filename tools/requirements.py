"""What pyproject.toml asks for, and what pip would install for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

# What torch brings along on some platforms only.
_OF_A_PLATFORM = ("nvidia-", "cuda-", "triton")


def declared() -> list[Requirement]:
    """The dependencies of the package and of all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(each) for dependencies in lists for each in dependencies]


def lower_bound(requirement: Requirement) -> str:
    """The oldest version that it allows."""
    (oldest,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return oldest


def resolved(wanted: Iterable[str], constraints: Iterable[str] = ()) -> dict[str, Version]:
    """The package versions that pip chooses for `wanted` (arguments of `pip install`), by name; installs nothing.

    They hold on every platform: what is of one platform only, and suffixes like `+cpu`, are left out.

    Raises:
        subprocess.CalledProcessError: pip finds nothing that fits; it has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        given.write_text("\n".join(constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), "-c", str(given), *wanted], check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {canonicalize_name(item["name"]): Version(Version(item["version"]).public) for item in found}
    return {name: versions[name] for name in sorted(versions) if not name.startswith(_OF_A_PLATFORM)}
