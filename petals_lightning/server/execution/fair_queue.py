"""Which request runs next: clients share the compute by seconds used. Pure logic: no threads, an injected clock.

The client that has used the least goes next. A client that returns after a pause starts level with the others: idle
time is not saved up. A moment between an answer and the next request is not a pause.

Short steps of a conversation (priority 0) go before everything else, because a person waits for each. This holds while
their client is not ahead: some other client has used at least as much as this client's short steps have. Long steps
(`LONG_STEP`) take their turn. They are held for a moment if a client that is behind was just answered. Otherwise a
client that sends one request at a time would find a long step running each time, and get one turn for each of those.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

SHORT_STEP, LONG_STEP = 0, 3
"""The priorities that this queue treats specially. Those in between only order the items of one client."""
_MAX_SHARES = 1024  # beyond this, absent clients are forgotten: an attacker can make any number of ids
_PAUSE = 0.1  # seconds after an answer, after which a client counts as absent
_HELD = 0.25  # of the seconds that a client is behind: how long a step is held for it, at most until it is absent


@dataclass
class Ticket(Generic[T]):
    """An item's place in the queue."""

    client: str
    priority: int
    arrival: int
    item: T
    key: Hashable = None

    def __lt__(self, other: Ticket[T]) -> bool:
        return (self.priority, self.arrival) < (other.priority, other.arrival)


@dataclass
class _Share(Generic[T]):
    """What one client has used, and its items in the queue.

    Attributes:
        used: seconds of compute in all.
        short: seconds of its short steps only, so that a long step does not delay the short ones after it.
        waiting: a heap of its items in the queue.
        running: items that were taken and not yet charged.
        left: when the last one was charged.
        held: when a long step was first held for it since then, and until when.
    """

    used: float
    short: float
    waiting: list[Ticket[T]] = field(default_factory=list)
    running: int = 0
    left: float = float("-inf")
    held: tuple[float, float] | None = None


class FairQueue(Generic[T]):
    """A queue of items of many clients. Within one client: by priority, then by arrival."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares: dict[str, _Share[T]] = {}
        self._arrivals = 0
        self._level = 0.0  # the least that any present client has used
        self._clock = clock

    def __len__(self) -> int:
        return sum(len(share.waiting) for share in self._shares.values())

    def put(self, client: str, priority: int, item: T, key: Hashable = None) -> Ticket[T]:
        now = self._clock()
        if not any(self._is_present(share, now) for share in self._shares.values()):
            self._shares.clear()  # no client was present, so none was kept waiting: all start again
        share = self._shares.setdefault(client, _Share(self._level, self._level))
        if share.held is not None:  # it is charged for the time that was kept free for it
            since, until = share.held
            share.used += min(now, until) - since
            share.held = None
        if not self._is_present(share, now):
            share.used = max(share.used, self._level)
        self._arrivals += 1
        ticket = Ticket(client, priority, self._arrivals, item, key)
        heapq.heappush(share.waiting, ticket)
        return ticket

    def hold(self) -> float:
        """Seconds to wait before taking the next item, unless an item is put or charged meanwhile."""
        waiting = [share for share in self._shares.values() if share.waiting]
        if not waiting or (chosen := self._next(waiting)).waiting[0].priority != LONG_STEP:
            return 0.0
        now, longest = self._clock(), 0.0
        for share in self._shares.values():
            seconds = min(_HELD * (chosen.used - share.used), _PAUSE)
            if share.waiting or seconds <= 0:
                continue
            if share.running:
                longest = max(longest, seconds)
            elif (left := share.left + seconds - now) > 0:
                share.held = share.held or (now, now + left)
                longest = max(longest, left)
        return longest

    def pop(self) -> Ticket[T] | None:
        """Takes the next item; None if the queue is empty."""
        waiting = [share for share in self._shares.values() if share.waiting]
        if not waiting:
            return None
        now = self._clock()
        self._level = max(
            self._level, min(share.used for share in self._shares.values() if self._is_present(share, now))
        )
        chosen = self._next(waiting)
        ticket = self._take(chosen)
        # A share that is not ahead is the same as a new one.
        for client, share in list(self._shares.items()):
            if share.used <= self._level and not self._is_present(share, now):
                del self._shares[client]
        return ticket

    def pop_batch(self, fits: Callable[[T], bool]) -> list[Ticket[T]]:
        """Takes further short steps that fit into a batch, of all clients in the order of their turns.

        The items of one client stay in order: the first one that does not fit holds back those behind it.
        """
        batch = []
        for share in sorted(self._shares.values(), key=lambda share: share.used):
            for ticket in sorted(share.waiting):
                if ticket.priority != SHORT_STEP or not fits(ticket.item):
                    break
                batch.append(self._take(share))
        return batch

    def charge(self, ticket: Ticket[T], seconds: float) -> None:
        """Counts the seconds of an item that has ended. Each item that was taken is charged once."""
        share = self._shares[ticket.client]
        share.used += seconds
        if ticket.priority == SHORT_STEP:
            share.short = max(share.short, self._level) + seconds
        share.running -= 1
        share.left = self._clock()
        if len(self._shares) > _MAX_SHARES:
            self._shares = {name: each for name, each in self._shares.items() if each.waiting or each.running}

    def discard(self, ticket: Ticket[T]) -> None:
        """Removes an item that need not run any more; does nothing if it was taken already."""
        share = self._shares.get(ticket.client)
        if share is not None and ticket in share.waiting:
            share.waiting.remove(ticket)
            heapq.heapify(share.waiting)

    def _next(self, waiting: list[_Share[T]]) -> _Share[T]:
        most, second = heapq.nlargest(2, [*(share.used for share in self._shares.values()), float("-inf")])

        def is_urgent(share: _Share[T]) -> bool:
            others = second if share.used == most else most
            return share.waiting[0].priority == SHORT_STEP and max(share.short, self._level) <= others

        if urgent := [share for share in waiting if is_urgent(share)]:
            return min(urgent, key=lambda share: (max(share.short, self._level), share.waiting[0].arrival))
        return min(waiting, key=lambda share: (share.used, share.waiting[0].arrival))

    def _take(self, share: _Share[T]) -> Ticket[T]:
        share.running += 1
        return heapq.heappop(share.waiting)

    def _is_present(self, share: _Share[T], now: float) -> bool:
        return bool(share.waiting or share.running) or now - share.left < _PAUSE

    def ahead(self, key: Hashable) -> int | None:
        """About how many items run before the one named `key`, if clients take turns; None if it is not waiting."""
        for share in self._shares.values():
            for ticket in share.waiting:
                if ticket.key == key:
                    own = sum(other < ticket for other in share.waiting)
                    others = sum(min(len(s.waiting), own + 1) for s in self._shares.values() if s is not share)
                    return own + others
        return None
