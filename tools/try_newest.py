"""`python -m tools.try_newest`: tries the newest releases of all dependencies, also outside pyproject.toml's ranges.

Says which are outside. If any are, it installs them in an environment of its own (several GB, removed at the end), runs
the tests that .ci/run runs on the oldest and newest versions, and says what breaks; it ends with status 1 then.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from packaging.utils import canonicalize_name

from tools.requirements import ROOT, declared, lower_bound, resolved


def main() -> int:
    requirements = declared()
    versions = resolved(sorted({f"{each.name}>={lower_bound(each)}" for each in requirements}))
    newest = {each.name: versions[canonicalize_name(each.name)] for each in requirements}
    outside = [
        f"{each} (newest: {newest[each.name]})" for each in requirements if newest[each.name] not in each.specifier
    ]
    if not outside:
        print("the newest releases of all dependencies are inside the ranges: .ci/run tries them")
        return 0
    print("outside the ranges:", *outside, sep="\n  ", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        python, report = Path(folder, "venv", "bin", "python"), Path(folder, "report.xml")
        venv.create(Path(folder, "venv"), with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *(f"{name}=={version}" for name, version in versions.items())], check=True)
        subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
        tests = [str(python), "-m", "pytest", "@.ci/essential.txt", "-n", "2", "-q", f"--junit-xml={report}"]
        status = subprocess.run(tests, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
        if not report.exists():
            print(f"no test could be run (pytest's exit status {status}): {' '.join(tests[1:])}")
            return 1
        print(*_findings(report), sep="\n")
    return int(status != 0)


def _findings(report: Path) -> list[str]:
    """How many tests passed, and what the others failed on: the same error is one line."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for case in failed:
        result = next(child for child in case if child.tag in ("failure", "error"))
        message = (result.get("message") or "?").splitlines()[0][:160]
        found[message] += 1
        first.setdefault(message, f"{case.get('classname')}::{case.get('name')}")
    lines = [f"{count:4} × {message}  [{first[message]}]" for message, count in found.most_common()]
    return [*lines, f"{len(cases) - len(failed)} tests passed or were skipped, {len(failed)} failed"]


if __name__ == "__main__":
    sys.exit(main())
