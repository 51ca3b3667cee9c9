"""Every attack on a swarm, and what it costs, as a table.

python -m tests.hostile                                   # all: about fifteen minutes
python -m tests.hostile --attacks "records: forged,is silent"
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.helpers.families import save_heavier_checkpoint
from tests.hostile.harness import Arena
from tests.hostile.servers import SERVERS
from tools.testing.attacks import ATTACKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", default=",".join([*ATTACKS, *SERVERS]))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the warnings of banned servers would tear the table
    failed = False
    print("speed: of that without the attack; longest step and join in s; memory: MiB grown by")
    print(f"{'attack':28}{'speed':>6}{'longest':>9}{'join':>6}{'difference':>12}{'server':>8}{'client':>8}  retries")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_heavier_checkpoint(Path(folder))
        for attack in arguments.attacks.split(","):
            with Arena(checkpoint) as arena:
                found = arena.run(attack)
            broken = found.broken_promises(is_server=attack in SERVERS)
            failed |= bool(broken)
            print(
                f"{attack:28}{found.share:6.2f}{found.longest:9.2f}{found.newcomer:6.1f}{found.difference:12.1e}"
                f"{found.server:8.0f}{found.client:8.0f}{found.retries:9}"
                f"{'  <- ' + ', '.join(broken) if broken else ''}",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
