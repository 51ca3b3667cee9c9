"""The lock and the list of oldest versions follow pyproject.toml; what `tools.try_newest` says of a test run."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import requirements, try_newest

ROOT = Path(__file__).resolve().parents[1]
LOCKED, OLDEST = ROOT / "constraints.txt", ROOT / ".ci" / "lowest.txt"


def pins(path: Path) -> dict[str, Version]:
    found = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            found[name] = Version(version)
    return found


def test_the_lock_is_within_the_ranges():
    locked = pins(LOCKED)
    for each in requirements.declared():
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), f"{each}: run `python -m tools.lock`"


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins(OLDEST)
    for each in requirements.declared():
        bound = Version(requirements.lower_bound(each))
        assert oldest[canonicalize_name(each.name)] == bound, f"{each}: run `python -m tools.lock`"


@pytest.mark.parametrize("path", [LOCKED, OLDEST], ids=["locked", "oldest"])
def test_a_list_of_versions_holds_on_every_platform(path):
    for name, version in pins(path).items():
        assert version.local is None, name
        assert not name.startswith(("nvidia", "triton", "cuda")), name


def test_what_transformers_and_hivemind_may_be_ends_at_the_next_minor_release():
    bounds = {each.name: each.specifier for each in requirements.declared()}
    for name in ("transformers", "hivemind"):
        locked = pins(LOCKED)[name]
        assert not bounds[name].contains(f"{locked.major}.{locked.minor + 1}"), name


def test_versions_are_those_that_pip_would_install(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "one"\nversion = "3"\n[build-system]\nrequires = []\n'
        'build-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "backend.py").write_text(
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    os.mkdir(os.path.join(folder, 'one-3+cpu.dist-info'))\n"
        "    with open(os.path.join(folder, 'one-3+cpu.dist-info', 'METADATA'), 'w') as file:\n"
        "        file.write('Metadata-Version: 2.1\\nName: one\\nVersion: 3+cpu\\n')\n"
        "    return 'one-3+cpu.dist-info'\n"
    )
    assert requirements.resolved([str(tmp_path)]) == {"one": Version("3")}


def test_the_same_failure_is_told_once(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="1"/>'
        '<testcase classname="a" name="2"><failure message="TypeError: cache&#10;more"/></testcase>'
        '<testcase classname="b" name="3"><failure message="TypeError: cache&#10;other"/></testcase>'
        '<testcase classname="b" name="4"><skipped/></testcase>'
        '<testcase classname="b" name="5"><error message="ImportError: Cache"/></testcase></testsuite></testsuites>'
    )
    assert try_newest._findings(tmp_path / "report.xml") == [
        "   2 × TypeError: cache  [a::2]",
        "   1 × ImportError: Cache  [b::5]",
        "2 tests passed or were skipped, 3 failed",
    ]
