"""Placement in a simulated swarm: 1,000 servers hold 80 blocks, and come, die and move as `server.placement` says.

    python -m benchmarks.placement

No network and no model: the placement rules are those of a server, and the rest is what a server waits for: news that
arrive late, dead servers whose records live on, minutes of loading. Servers hold 4 to 12 blocks, and their speeds
differ by a factor of 16 between the slowest and the fastest tenth (log-normal). A row per story:

- joining: all join one after another, within half of the time;
- rest: nothing happens any more;
- churn: each server lives for four hours on average, and another joins for each that dies;
- mass loss: half of all servers die at once;
- region: every server that holds a block of one quarter of the model dies at once.

The bottleneck is the throughput of the weakest block, of servers that are serving. It is given as a share of two
placements: the best that is known (the same servers, searched from several starts without waiting or loading) and the
mean of all blocks, which no placement can exceed. `back` is the time until the bottleneck has come back
to 0.9 of the best known for good. The bottleneck is that of the second half of the time, on average and at
its worst. Moves are per server and hour, and the most of any server in any hour.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import typer

from benchmarks.options import Output
from benchmarks.rounds import print_table, save_rows
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.placement import (
    PlacedServer,
    Span,
    block_throughput,
    expected_throughput,
    plan_moves,
    planned_span,
    thinnest_span,
)
from petals_lightning.server.rebalancing import MAX_SETTLE, STAY_PERIODS

_NEWS = 5.0  # seconds until everybody knows what was announced
_LOADING = 120.0  # seconds to drain and to load blocks
_RECORD = 2 * ServerConfig().update_period  # seconds that a dead server's record lives on, at most
_SAMPLE = 30.0  # seconds between looks at the bottleneck
_HOUR = 3600.0
_ANY_GAIN = 1.1  # a quality above 1: plans go on as long as the badness shrinks


@dataclass
class _Server:
    """A simulated server; `place` is what it announces."""

    place: PlacedServer
    serves: Span | None = None
    alive: bool = True
    moved: list[float] = field(default_factory=list)


class Simulation:
    """A swarm in simulated time.

    Args:
        num_blocks: of the model.
        rng: of speeds, spans, waits and deaths.
        quality, period: `ServerConfig.balance_quality`, `balance_period`.

    Attributes:
        now: seconds.
        samples: times and bottlenecks of the last `run`.
    """

    def __init__(self, num_blocks: int, rng: np.random.Generator, *, quality: float, period: float):
        self.num_blocks, self.quality, self.period = num_blocks, quality, period
        self.now = 0.0
        self.servers: dict[str, _Server] = {}
        self.samples: list[tuple[float, float]] = []
        self._rng, self._numbers = rng, itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._known: dict[str, PlacedServer] = {}  # what everybody has heard
        self._plan: dict[str, Span] | None = None  # of what is known

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Has something happen after so many seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        self.samples.clear()
        sample = self.now
        while self._events and self._events[0][0] <= end:
            time, _, action = heapq.heappop(self._events)
            while sample < time:
                self.samples.append((sample, self.bottleneck()))
                sample += _SAMPLE
            self.now = time
            action()
        self.now = end

    def join(self) -> None:
        """A new server of random speed and size takes the thinnest place and loads."""
        length = int(self._rng.integers(4, 13))
        throughput = float(self._rng.lognormal(0.0, 1.08)) / length
        known = list(self._known.values())
        expected = expected_throughput(known, length)
        start, end = thinnest_span(known, self.num_blocks, length, expected)
        peer = f"{self._rng.integers(1 << 40):012x}"
        server = _Server(PlacedServer(peer, start, end, expected))
        self.servers[peer] = server
        self._announce(server)
        self.at(_LOADING, lambda: self._open(server, throughput))

    def die(self, peer: str) -> None:
        server = self.servers.pop(peer)
        server.alive, server.serves = False, None
        self.at(float(self._rng.uniform(_RECORD / 2, _RECORD)), lambda: self._forget(peer))

    def bottleneck(self) -> float:
        return float(self.serving().min())

    def serving(self) -> np.ndarray:
        """Throughput of each block, of the servers that serve now."""
        total = np.zeros(self.num_blocks)
        for server in self.servers.values():
            if server.serves is not None:
                total[slice(*server.serves)] += server.place.throughput
        return total

    def _open(self, server: _Server, throughput: float) -> None:
        if server.alive:
            place = server.place
            server.serves = place.start, place.end
            self._announce(server, replace(place, throughput=throughput))
            self.at(STAY_PERIODS * self.period, lambda: self._stay_over(server))

    def _stay_over(self, server: _Server) -> None:
        if server.alive and self.quality > 0:
            self._announce(server, replace(server.place, can_move=True))
            self._look_later(server)

    def _look_later(self, server: _Server) -> None:
        self.at(self.period * float(self._rng.uniform(0.5, 1.5)), lambda: self._look(server))

    def _look(self, server: _Server) -> None:
        if server.alive and self._planned(server) is None:
            self._look_later(server)
        elif server.alive:
            self.at(float(self._rng.uniform(0, self.period / 4)), lambda: self._look_again(server))

    def _look_again(self, server: _Server) -> None:
        if not server.alive:
            return
        if (span := self._planned(server)) is None:
            self._look_later(server)
            return
        self._announce(server, replace(server.place, next_span=span))
        self.at(min(MAX_SETTLE, self.period / 4), lambda: self._confirm(server, span))

    def _confirm(self, server: _Server, span: Span) -> None:
        if not server.alive:
            return
        known = [self._known[peer] for peer in sorted(self._known)]
        if planned_span(known, server.place.peer, self.num_blocks, self.quality, span) != span:
            self._announce(server, replace(server.place, next_span=None))
            self._look_later(server)
            return
        place = replace(server.place, start=span[0], end=span[1], next_span=None, can_move=False)
        server.moved.append(self.now)
        server.serves = None
        self._announce(server, place)
        self.at(_LOADING, lambda: self._open(server, place.throughput))

    def _planned(self, server: _Server) -> Span | None:
        if self._plan is None:
            known = [self._known[peer] for peer in sorted(self._known)]
            self._plan = plan_moves(known, self.num_blocks, self.quality)
        return self._plan.get(server.place.peer)

    def _announce(self, server: _Server, place: PlacedServer | None = None) -> None:
        server.place = place = place or server.place
        self.at(_NEWS, lambda: self._hear(place) if server.alive else None)

    def _hear(self, place: PlacedServer) -> None:
        self._known[place.peer], self._plan = place, None

    def _forget(self, peer: str) -> None:
        if self._known.pop(peer, None) is not None:
            self._plan = None


def best_known(places: Sequence[PlacedServer], num_blocks: int, rng: np.random.Generator, starts: int = 3) -> float:
    """The best bottleneck that is found for these servers: by moves from where they are, and from random places."""
    best = 0.0
    for number in range(starts):
        placed = [replace(each, can_move=True, next_span=None) for each in places]
        if number:
            order, placed = rng.permutation(len(placed)), []
            for each in (places[index] for index in sorted(order, key=lambda index: -places[index].throughput)):
                start, end = thinnest_span(placed, num_blocks, each.end - each.start, each.throughput)
                placed.append(replace(each, start=start, end=end, can_move=True, next_span=None))
        while moves := plan_moves(placed, num_blocks, _ANY_GAIN):
            placed = [replace(each, start=s, end=e) for each in placed for s, e in [moves.get(each.peer, each.span)]]
            best = max(best, float(block_throughput(placed, num_blocks).min()))
    return max(best, float(block_throughput(places, num_blocks).min()))


def main(
    servers: Annotated[int, typer.Option(help="in the swarm")] = 1000,
    blocks: Annotated[int, typer.Option(help="of the model")] = 80,
    hours: Annotated[float, typer.Option(help="of each story, in simulated time")] = 4.0,
    quality: Annotated[float, typer.Option(help="`--balance-quality` of the servers")] = ServerConfig.balance_quality,
    seed: int = 0,
    output: Output = None,
) -> None:
    """Prints a row per story."""
    stories = "joining", "rest", "churn", "mass loss", "region"
    rows = [_tell(story, servers, blocks, hours, quality, seed) for story in stories]
    columns = ("story", "of best known", "of mean", "worst", "back, min", "moves/h", "most/h")
    cells = [(row[0], *(f"{value:.2f}" for value in row[1:])) for row in rows]
    print_table(f"{servers} servers × {blocks} blocks, balance quality {quality:g}", columns, cells)
    save_rows(rows, output)


def _tell(
    story: str, servers: int, blocks: int, hours: float, quality: float, seed: int
) -> tuple[str, *tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    swarm = Simulation(blocks, rng, quality=quality, period=ServerConfig.balance_period)
    for number in range(servers):
        swarm.at(number * hours / 2 * _HOUR / servers, swarm.join)
    if story != "joining":
        swarm.run(hours * _HOUR)
        for server in swarm.servers.values():
            server.moved.clear()
    if story == "churn":
        _let_die(swarm, rng, 4 * _HOUR)
    elif story == "mass loss":
        for peer in rng.permutation(sorted(swarm.servers))[: servers // 2]:
            swarm.die(str(peer))
    elif story == "region":
        for peer in [peer for peer, each in swarm.servers.items() if each.place.start < blocks // 4]:
            swarm.die(peer)
    began = swarm.now
    swarm.run(hours * _HOUR)
    places = [each.place for each in swarm.servers.values()]
    best, mean = best_known(places, blocks, rng), float(block_throughput(places, blocks).mean())
    late = [value for time, value in swarm.samples if time > began + hours * _HOUR / 2]
    low = [time for time, value in swarm.samples if value < 0.9 * best]
    recovered = (max(low, default=began - _SAMPLE) + _SAMPLE - began) / 60
    moved = [each.moved for each in swarm.servers.values()]
    most = max(sum(begin <= time < begin + _HOUR for time in times) for times in moved for begin in times or [0.0])
    usual = sum(late) / len(late)
    per_hour = sum(map(len, moved)) / len(moved) / hours
    return story, usual / best, usual / mean, min(late) / best, recovered, per_hour, float(most)


def _let_die(swarm: Simulation, rng: np.random.Generator, lifetime: float) -> None:
    """From now on servers die at random, and for each that does another joins."""

    def strike() -> None:
        peers = sorted(swarm.servers)
        swarm.die(peers[int(rng.integers(len(peers)))])
        swarm.join()
        swarm.at(float(rng.exponential(lifetime / len(peers))), strike)

    swarm.at(0.0, strike)


if __name__ == "__main__":
    typer.run(main)
