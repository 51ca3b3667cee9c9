"""The whole matrix of faults and phases, as a table.

python -m tests.faults                                   # all: about ten minutes
python -m tests.faults --faults kill,hang --phases backward
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.faults.harness import (
    FAULTS,
    LIMITS,
    PHASES,
    FaultySwarm,
    make_yardstick,
    run_case,
    steps_until_recovery,
    train_remotely,
)
from tests.helpers.families import save_heavier_checkpoint
from tools.testing.swarms import SERVERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--servers", choices=SERVERS, default="ours")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the warnings of banned servers would tear the table
    failed = False
    with (
        tempfile.TemporaryDirectory() as folder,
        FaultySwarm(save_heavier_checkpoint(Path(folder)), arguments.servers) as swarm,
    ):
        undisturbed = train_remotely(swarm)
        yardstick = make_yardstick(swarm)
        print(f"off float64: in one process {yardstick.rounding:.1e}, ", end="")
        print(f"undisturbed {undisturbed.differs_from(yardstick.exact):.1e}, without a sample {yardstick.share:.1e}")
        print(f"a usual step takes {min(undisturbed.seconds):.2f} s, loading {undisturbed.loading:.2f} s; stalls in s")
        print(f"{'fault':18}{'phase':12}{'stall':>7}{'later':>7}{'difference':>12}  retries  hedges", flush=True)
        for fault in arguments.faults.split(","):
            for phase in arguments.phases.split(","):
                case = run_case(swarm, fault, phase, undisturbed, yardstick.exact)
                limit = LIMITS.get(fault)
                good = case.difference < yardstick.bound and (limit is None or case.stall <= limit)
                failed |= not good
                print(
                    f"{fault:18}{phase:12}{case.stall:7.2f}{case.later_stall:7.2f}{case.difference:12.1e}"
                    f"{case.retries:9}{case.hedges:8}{'' if good else '  <- not as promised'}",
                    flush=True,
                )
        recovered, step, longest = steps_until_recovery(swarm)
        print(f"10 × slower server: usual after {recovered} steps (usual {step:.2f} s, longest {longest:.2f} s)")
        failed |= recovered > 20
    sys.exit(failed)


if __name__ == "__main__":
    main()
