"""Imports flow down the layers of the design only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import petals_lightning

PACKAGE = Path(petals_lightning.__file__).parent
LAYERS = [
    {"errors", "library_messages"},
    {"options"},
    {"protocol", "sample"},
    {"swarm"},
    {"hf"},
    {"client", "server"},  # beside each other, and never one from the other
    {"models"},
    {"data", "strategies"},
    {"callbacks", "modules"},
    {"training"},
    {"cli"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The parts of this package that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "petals_lightning" and rest and not rest.startswith("__"):
                found.add(rest.split(".")[0])
    return found


def test_all_modules_are_found():
    assert {part_of(path) for path in MODULES} >= {
        "errors",
        "protocol",
        "swarm",
        "hf",
        "client",
        "server",
        "models",
        "cli",
    }
    assert len(MODULES) > 30


def test_imports_are_found():
    assert imports_of(PACKAGE / "client" / "chain.py") >= {"client", "errors", "protocol"}
    assert "server" in imports_of(PACKAGE / "cli" / "serve.py"), "imports inside functions count too"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_layers_below_only(path):
    mine = part_of(path)
    assert mine in RANK, f"{mine} has no place in LAYERS yet"
    for other in imports_of(path) - {mine}:
        assert RANK[other] < RANK[mine], f"{mine} imports {other}"
