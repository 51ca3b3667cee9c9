"""Where a new server helps most. Pure: takes what the swarm has, gives a span."""

from __future__ import annotations

from collections.abc import Sequence


def thinnest_span(throughput: Sequence[float], length: int) -> tuple[int, int]:
    """The span of `length` blocks that holds the swarm back most.

    Args:
        throughput: for each block, the summed throughput of the servers that hold it.
        length: blocks to host, capped at the model's.

    Returns:
        (start, end) of the window whose sorted throughputs are smallest, weakest block first; the leftmost of equals.
    """
    length = min(length, len(throughput))
    starts = range(len(throughput) - length + 1)
    start = min(starts, key=lambda first: (sorted(throughput[first : first + length]), first))
    return start, start + length
