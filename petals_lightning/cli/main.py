"""Entry point of `petals-lightning`: one line for a user's error, no warnings of libraries on the screen."""

from __future__ import annotations

import os
import sys

# Before torch is imported anywhere: spinning OpenMP threads starve every other process on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy's: they spin too

from petals_lightning.errors import PetalsLightningError
from petals_lightning.library_messages import warnings_to_log


def main() -> None:
    """Runs the command; an error that a user can mend is one line on stderr and exit status 1."""
    warnings_to_log()
    from petals_lightning.cli.app import app

    try:
        app()
    except PetalsLightningError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
