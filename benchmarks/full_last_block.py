"""The project's own server, whose last block runs on all positions, also on those that nobody reads.

python -m benchmarks.full_last_block serve MODEL --new-swarm ...
"""

from __future__ import annotations

from petals_lightning.cli.main import main
from petals_lightning.server.span import BlockSpan


def run_on_all_positions() -> None:
    """From now on, for every server of this process."""
    BlockSpan._reads_one_each = lambda span, inputs, prefix: False  # type: ignore[method-assign]


if __name__ == "__main__":
    run_on_all_positions()
    main()
