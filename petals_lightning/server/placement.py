"""Where servers hold their blocks, and which of them move. Pure functions of what the swarm's servers announce.

The rate of a swarm is that of its weakest block, the bottleneck: the sum of the throughputs of the servers that hold
it. Finding the placement with the best bottleneck is hard (it contains the partition problem). So every server
descends on one number that all of them compute alike, the badness of the swarm: the sum over its blocks of
`(throughput / mean throughput) ** -8`. Weak blocks dominate that sum, so making it smaller raises the bottleneck. Each
move makes it smaller; therefore moves end, and no two servers chase each other.

Shapes: N servers, L blocks of the model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from petals_lightning.protocol.records import ServerRecord, ServerState

_FLOOR = 0.1  # of the mean throughput: a block without a server is bad, but others still count beside it
_REACHABLE = 0.95  # of the mean throughput, which no bottleneck exceeds: seeking more takes long, and finds little
_LEAST_GAIN = 1e-6  # of the badness: a smaller gain may be rounding
_ROUNDING = 1e-12  # a share that counts as nothing

Span = tuple[int, int]


@dataclass(frozen=True)
class PlacedServer:
    """A server and its place.

    Attributes:
        peer: its id.
        start, end: the blocks that it holds, or will hold when it has loaded them.
        throughput: requests a second that it answers for these blocks; the same wherever they are.
        can_move: it follows plans.
        next_span: the blocks that it is about to move to, if any.
    """

    peer: str
    start: int
    end: int
    throughput: float
    can_move: bool = False
    next_span: Span | None = None

    @property
    def span(self) -> Span:
        """Where it will be."""
        return self.next_span or (self.start, self.end)


def placed_servers(table: Sequence[Mapping[str, ServerRecord]]) -> list[PlacedServer]:
    """The servers of a model, in an order that is the same for all who look.

    Those that are still loading count: whoever comes next must not choose the same place.

    Args:
        table: for each block the records of its servers, as `SwarmDirectory.servers` returns them.
    """
    first: dict[str, Span] = {}
    records: dict[str, ServerRecord] = {}
    for block, found in enumerate(table):
        for peer, record in found.items():
            start, end = first.get(peer, (block, block))
            if record.state is not ServerState.OFFLINE and end == block:  # what follows a gap is an earlier place
                first[peer], records[peer] = (start, block + 1), record
    placed = []
    for peer in sorted(first):
        record, following = records[peer], None
        if record.next_start is not None and record.next_end is not None and record.next_end <= len(table):
            following = record.next_start, record.next_end
        placed.append(PlacedServer(peer, *first[peer], record.throughput, record.can_move, following))
    return placed


def block_throughput(servers: Iterable[PlacedServer], num_blocks: int) -> np.ndarray:
    """For each block the summed throughput of the servers that hold it, or will: [L]."""
    total = np.zeros(num_blocks)
    for server in servers:
        start, end = server.span
        total[start:end] += server.throughput
    return total


def thinnest_span(servers: Sequence[PlacedServer], num_blocks: int, length: int, throughput: float) -> Span:
    """The span of `length` blocks where one more server makes the swarm better by most; of equals the leftmost.

    Args:
        servers: those that are there.
        num_blocks: of the model, L.
        length: how many blocks the new server holds, capped at L.
        throughput: that it will have.
    """
    length = min(length, num_blocks)
    total = block_throughput(servers, num_blocks)
    gains = _window_gains(total[None], np.array([throughput]), np.array([length]), _mean(total, throughput * length))[0]
    start = _first_best(gains)
    return start, start + length


def expected_throughput(servers: Iterable[PlacedServer], length: int) -> float:
    """The throughput to assume for a server that has not measured its own yet: the median of others of this length."""
    return statistics.median([each.throughput * (each.end - each.start) / length for each in servers] or [1.0])


def plan_moves(servers: Sequence[PlacedServer], num_blocks: int, quality: float) -> dict[str, Span]:
    """The moves after which the bottleneck is 1 / `quality` times what it is, or none if no such moves are found.

    Each step takes the move that makes the swarm better by most. Whoever computes this for the same servers finds the
    same moves, so servers need not agree on them by messages.

    Args:
        servers: all of the model.
        num_blocks: of the model, L.
        quality: share, from 0 (nobody ever moves) to 1 (for the least gain).

    Returns:
        The spans to move to, by peer, in the order of their worth.
    """
    total = block_throughput(servers, num_blocks)
    bottleneck, mean = float(total.min()), _mean(total, 0.0)
    if bottleneck >= quality * _REACHABLE * total.mean():
        return {}
    movers = [
        each for each in servers if each.can_move and each.next_span is None and each.end - each.start < num_blocks
    ]
    starts, ends = (np.array([getattr(each, name) for each in movers]) for name in ("start", "end"))
    throughputs, moves = np.array([each.throughput for each in movers]), dict[str, Span]()
    while len(movers) > len(moves):
        moved = np.array([each.peer in moves for each in movers])
        number, start = _best_move(total, mean, starts, ends, throughputs, moved)
        if number is None:
            break
        length = ends[number] - starts[number]
        total[starts[number] : ends[number]] -= throughputs[number]
        total[start : start + length] += throughputs[number]
        moves[movers[number].peer] = int(start), int(start + length)
        if total.min() > bottleneck / quality + _ROUNDING * mean:
            return moves
    return {}


def planned_span(
    servers: Sequence[PlacedServer], peer: str, num_blocks: int, quality: float, announced: Span | None = None
) -> Span | None:
    """The span that the plan moves a server to; None if it stays.

    Args:
        servers: all of the model.
        peer: the server.
        num_blocks, quality: as of `plan_moves`.
        announced: the span that it has announced to move to. Of two that have announced to fill one hole, that with the
            lesser id goes: those with greater ids are planned without.
    """
    seen = []
    for each in servers:
        if each.peer == peer:
            each = replace(each, next_span=None)
        elif announced and each.next_span and each.peer > peer and _overlap(each.next_span, announced):
            each = replace(each, next_span=None, can_move=False)
        seen.append(each)
    return plan_moves(seen, num_blocks, quality).get(peer)


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _best_move(
    total: np.ndarray, mean: float, starts: np.ndarray, ends: np.ndarray, throughputs: np.ndarray, moved: np.ndarray
) -> tuple[int | None, int]:
    """The number and the new start of the server whose move is worth most; (None, 0) if none is worth anything."""
    blocks = np.arange(len(total))
    held = (starts[:, None] <= blocks) & (blocks < ends[:, None])
    without = np.maximum(total - held * throughputs[:, None], 0.0)
    gains = _window_gains(without, throughputs, ends - starts, mean)
    gains -= gains[np.arange(len(starts)), starts][:, None]
    gains[moved] = 0.0
    number, start = divmod(_first_best(gains.ravel()), len(total))
    if gains[number, start] <= _LEAST_GAIN * _badness(total, mean).sum():
        return None, 0
    return number, start


def _window_gains(without: np.ndarray, throughputs: np.ndarray, lengths: np.ndarray, mean: float) -> np.ndarray:
    """By how much the badness shrinks when a server is added at each start: [N, L], -inf where it does not fit.

    Args:
        without: for each server the throughput of the blocks without it, [N, L].
        throughputs, lengths: of the servers, [N].
        mean: throughput of a block.
    """
    num_servers, num_blocks = without.shape
    gain = _badness(without, mean) - _badness(without + throughputs[:, None], mean)
    sums = np.zeros((num_servers, num_blocks + 1))
    np.cumsum(gain, axis=1, out=sums[:, 1:])
    ends = np.arange(num_blocks) + lengths[:, None]
    gains = np.take_along_axis(sums, np.minimum(ends, num_blocks), axis=1) - sums[:, :-1]
    gains[ends > num_blocks] = -np.inf
    return gains


def _first_best(gains: np.ndarray) -> int:
    """The first of the greatest, which rounding may have made slightly different."""
    return int((gains >= gains.max() * (1 - _ROUNDING)).argmax())


def _badness(throughput: np.ndarray, mean: float) -> np.ndarray:
    inverse = 1 / (throughput / mean + _FLOOR)
    inverse *= inverse
    inverse *= inverse
    return inverse * inverse


def _mean(total: np.ndarray, added: float) -> float:
    """The mean throughput of a block, never 0."""
    return float((total.sum() + added) / len(total)) or 1.0
