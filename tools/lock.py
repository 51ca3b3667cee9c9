"""`python -m tools.lock`: writes constraints.txt and .ci/lowest.txt anew, from what the registry has today.

constraints.txt has the newest versions that pyproject.toml allows, .ci/lowest.txt the oldest. Both name every package
that is installed, so that a newcomer, and .ci/run on another day, get the same. Run .ci/run before you commit them.
"""

from __future__ import annotations

from tools.requirements import ROOT, declared, lower_bound, resolved

# Held back: newer builds for Linux all bring CUDA along, 5 GB. .ci/run tries one of them in its newest environment.
HELD = ["torch==2.13.0"]

_HEADER = "# Written by `python -m tools.lock`: do not edit.\n"


def main() -> None:
    lowest = [f"{requirement.name}=={lower_bound(requirement)}" for requirement in declared()]
    for path, constraints in ((ROOT / "constraints.txt", HELD), (ROOT / ".ci" / "lowest.txt", lowest)):
        versions = resolved(["-e", f"{ROOT}[dev]"], constraints)
        del versions["petals-lightning"]
        path.write_text(_HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items()))
        print(f"{path.relative_to(ROOT)}: {len(versions)} packages")


if __name__ == "__main__":
    main()
