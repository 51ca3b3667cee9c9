"""Clocks that stand still, or are wrong."""

from __future__ import annotations

import sys
import time

from petals_lightning.cli.main import main

CLOCK_SHIFT = 100.0


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def main_with_a_wrong_clock() -> None:
    """`petals-lightning` on a machine whose clock is `CLOCK_SHIFT` seconds ahead: a `program` of `start_server`."""
    for module in list(sys.modules.values()):  # hivemind's modules have each imported the function
        if getattr(module, "get_dht_time", None) is time.time:
            vars(module)["get_dht_time"] = lambda: time.time() + CLOCK_SHIFT
    main()
