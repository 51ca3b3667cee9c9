"""What `petals_lightning` offers at its top: each name is there, typed, and is what the README's Python code uses."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import petals_lightning

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_every_name_is_there():
    assert len(petals_lightning.__all__) > 20
    for name in petals_lightning.__all__:
        assert getattr(petals_lightning, name) is not None
        assert name in dir(petals_lightning)
    with pytest.raises(AttributeError, match="has no attribute 'AutoDistributedMdel'"):
        _ = petals_lightning.AutoDistributedMdel


def test_type_checkers_see_every_name():
    tree = ast.parse(Path(petals_lightning.__file__).read_text())
    seen = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(petals_lightning.__all__) - {"__version__"} <= seen
    assert (Path(petals_lightning.__file__).parent / "py.typed").is_file()


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, petals_lightning; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def names_of(tree: ast.Module) -> dict[str, Any]:
    """What a snippet imports, by the names that it gives it."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = import_module(node.module)
            found |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_readmes_python_calls_what_there_is(snippet: str):
    tree = ast.parse(snippet)
    names, checked = names_of(tree), 0
    assert names, "a snippet imports what it uses"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        path = ast.unparse(call.func).split(".")
        if path[0] not in names:
            continue
        target = names[path[0]]
        for part in path[1:]:
            target = getattr(target, part)
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(target).bind(*[None] * len(call.args), **keywords)  # raises on what is no argument
        checked += 1
    assert checked
