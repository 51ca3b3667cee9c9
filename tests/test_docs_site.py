"""The site of docs/ builds without a warning, and the reference names all that the package offers at its top."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import petals_lightning
from tools.docs_site import on_page_markdown

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "python" / "index.html").read_text()
    assert "initial_peers" in reference, "docstrings are rendered"


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: petals_lightning\.(?:\w+\.)*(\w+)$", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
    missing = set(petals_lightning.__all__) - {"__version__", "ClientConfig"} - set(named)
    assert not missing
    assert "options.md" in (ROOT / "docs/python.md").read_text(), "which describes ClientConfig"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in menu, page.name


def test_files_outside_of_the_site_are_named():
    assert on_page_markdown("see [`lock.py`](../tools/lock.py) and [it](../a/b.md#c)") == (
        "see `tools/lock.py` and it (`a/b.md`)"
    )
