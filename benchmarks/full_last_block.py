"""The project's own server, whose last block runs on all positions, also on those that nobody reads.

python -m benchmarks.full_last_block serve MODEL --new-swarm ...
"""

from __future__ import annotations

from petals_lightning.cli.main import main
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs


def run_on_all_positions() -> None:
    """From now on, for every server of this process."""

    def reads_all(self: BlockSpan, inputs: SpanInputs, prefix: int) -> bool:
        return False

    BlockSpan._reads_one_each = reads_all  # type: ignore[method-assign]


def serve() -> None:
    """`petals-lightning` with such blocks."""
    run_on_all_positions()
    main()


if __name__ == "__main__":
    serve()
