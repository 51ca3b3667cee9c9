"""What is shared has a place of its own: nobody imports a test module, and only tests import from tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {
    "petals_lightning": {"petals_lightning"},
    "tools": {"petals_lightning", "tools"},
    "benchmarks": {"petals_lightning", "tools", "benchmarks"},
    "tests": {"petals_lightning", "tools", "tests"},
    "tests/benchmarks": {"petals_lightning", "tools", "tests", "benchmarks"},
}
"""Of this repository's packages, those that the files of a folder may import."""
PACKAGES = {folder for folder in NEEDS if "/" not in folder}


def imports_of(path: Path) -> set[str]:
    """Modules, and what is taken from them, by their full names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def test_imports_are_found() -> None:
    assert "tests.helpers.parity.pair" in imports_of(ROOT / "tests" / "models" / "test_parity.py")


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_file_imports_what_its_folder_may(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        folder = max((folder for folder in NEEDS if path.is_relative_to(ROOT / folder)), key=len)
        for name in imports_of(path):
            assert name.split(".")[0] in NEEDS[folder], f"{path} imports {name}"
            assert ".test_" not in name, f"{path} imports {name}: what tests share is in tests/helpers"
