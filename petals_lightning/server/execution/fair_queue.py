"""Who is next: clients share the compute by seconds used. Pure: no threads, and a clock that is given.

A client's turn comes when it has used the least. One that comes back after a pause starts level with the others: idle
time is not saved up. A moment between an answer and the next request is no pause.

Short steps of a conversation (priority 0) go before everything else, because somebody waits for each, as long as their
client is not ahead: some other client has used as much as these steps of it have. Long ones (`LONG_STEP`) take their
turn, and they are held for a moment where a client that is behind has just been answered: requests of a client that
sends one at a time would otherwise find a long step under way each time, and get one turn for each of those.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

SHORT_STEP, LONG_STEP = 0, 3
"""The priorities that this queue knows; those between differ within one client only."""
_MAX_SHARES = 1024  # debts of absent clients are not remembered beyond this: ids cost an attacker nothing
_PAUSE = 0.1  # seconds after an answer from which a client counts as absent
_HELD = 0.25  # of the seconds that a client is behind, a long step is held for it, until it is absent


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
    """What one client has used, and what of it waits.

    Attributes:
        used: seconds, all together.
        short: those of its short steps alone, so that a long step does not make the short ones after it slow.
        waiting: a heap.
        under_way: items that were taken and not yet charged.
        left: when the last one was.
        held: when something was first held for it since it left, and until when it was meant to be.
    """

    used: float
    short: float
    waiting: list[Ticket[T]] = field(default_factory=list)
    under_way: int = 0
    left: float = float("-inf")
    held: tuple[float, float] | None = None


class FairQueue(Generic[T]):
    """A queue of items of many clients. Within one client: by priority, then by arrival."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares: dict[str, _Share[T]] = {}
        self._arrivals = 0
        self._level = 0.0  # the least that a client has used which is here
        self._clock = clock

    def __len__(self) -> int:
        return sum(len(share.waiting) for share in self._shares.values())

    def put(self, client: str, priority: int, item: T, key: Hashable = None) -> Ticket[T]:
        now = self._clock()
        if not any(self._is_here(share, now) for share in self._shares.values()):
            self._shares.clear()  # nobody was here, so nobody was kept waiting: all begin anew
        share = self._shares.setdefault(client, _Share(self._level, self._level))
        if share.held is not None:  # the time that was kept free for it is its own
            since, until = share.held
            share.used += min(now, until) - since
            share.held = None
        if not self._is_here(share, now):
            share.used = max(share.used, self._level)
        self._arrivals += 1
        ticket = Ticket(client, priority, self._arrivals, item, key)
        heapq.heappush(share.waiting, ticket)
        return ticket

    def hold(self) -> float:
        """Seconds for which the next item should not be taken, unless others come or are charged meanwhile."""
        waiting = [share for share in self._shares.values() if share.waiting]
        if not waiting or (chosen := self._next(waiting)).waiting[0].priority != LONG_STEP:
            return 0.0
        now, longest = self._clock(), 0.0
        for share in self._shares.values():
            patience = min(_HELD * (chosen.used - share.used), _PAUSE)
            if share.waiting or patience <= 0:
                continue
            if share.under_way:
                longest = max(longest, patience)
            elif (left := share.left + patience - now) > 0:
                share.held = share.held or (now, now + left)
                longest = max(longest, left)
        return longest

    def pop(self) -> Ticket[T] | None:
        """The next item; None if nothing waits."""
        waiting = [share for share in self._shares.values() if share.waiting]
        if not waiting:
            return None
        now = self._clock()
        self._level = max(self._level, min(share.used for share in self._shares.values() if self._is_here(share, now)))
        chosen = self._next(waiting)
        ticket = self._take(chosen)
        # A share without debt says no more than a new one would.
        for client, share in list(self._shares.items()):
            if share.used <= self._level and not self._is_here(share, now):
                del self._shares[client]
        return ticket

    def pop_company(self, joins: Callable[[T], bool]) -> list[Ticket[T]]:
        """Further short steps that join those taken before, of all clients, in the order of their turns.

        No item of a client goes before another that this client has put in earlier.
        """
        company = []
        for share in sorted(self._shares.values(), key=lambda share: share.used):
            for ticket in sorted(share.waiting):
                if ticket.priority != SHORT_STEP or not joins(ticket.item):
                    break
                company.append(self._take(share))
        return company

    def charge(self, ticket: Ticket[T], seconds: float) -> None:
        """Counts what an item took, which ends here. Each that is taken is charged once."""
        share = self._shares[ticket.client]
        share.used += seconds
        if ticket.priority == SHORT_STEP:
            share.short = max(share.short, self._level) + seconds
        share.under_way -= 1
        share.left = self._clock()
        if len(self._shares) > _MAX_SHARES:
            self._shares = {name: each for name, each in self._shares.items() if each.waiting or each.under_way}

    def discard(self, ticket: Ticket[T]) -> None:
        """Takes an item out that need not run any more; does nothing if it is out already."""
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
        share.under_way += 1
        return heapq.heappop(share.waiting)

    def _is_here(self, share: _Share[T], now: float) -> bool:
        return bool(share.waiting or share.under_way) or now - share.left < _PAUSE

    def ahead(self, key: Hashable) -> int | None:
        """About how many items run before the one put under `key`, if clients take turns; None if it does not wait."""
        for share in self._shares.values():
            for ticket in share.waiting:
                if ticket.key == key:
                    own = sum(other < ticket for other in share.waiting)
                    others = sum(min(len(s.waiting), own + 1) for s in self._shares.values() if s is not share)
                    return own + others
        return None
