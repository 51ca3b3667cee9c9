"""Who is next: clients share the compute by seconds used. Pure: no threads, no clock.

A client's turn comes when it has used the least. One that comes back after a pause starts level with the others: idle
time is not saved up. Steps of a conversation (priority 0) go before everything else, whose-ever they are, because they
are short and somebody waits for each; among them, too, the client that has used the least is next.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_MAX_SHARES = 1024  # debts of absent clients are not remembered beyond this: ids cost an attacker nothing


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
    used: float
    waiting: list[Ticket[T]] = field(default_factory=list)  # a heap


class FairQueue(Generic[T]):
    """A queue of items of many clients. Within one client: by priority, then by arrival."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share[T]] = {}
        self._arrivals = 0
        self._level = 0.0  # seconds used by the client served last, when its turn began

    def __len__(self) -> int:
        return sum(len(share.waiting) for share in self._shares.values())

    def put(self, client: str, priority: int, item: T, key: Hashable = None) -> Ticket[T]:
        share = self._shares.setdefault(client, _Share(self._level))
        if not share.waiting:
            share.used = max(share.used, self._level)
        self._arrivals += 1
        ticket = Ticket(client, priority, self._arrivals, item, key)
        heapq.heappush(share.waiting, ticket)
        return ticket

    def pop(self) -> Ticket[T] | None:
        """The next item; None if nothing waits."""
        shares = [share for share in self._shares.values() if share.waiting]
        if not shares:
            return None
        urgent = [share for share in shares if share.waiting[0].priority == 0]
        chosen = min(urgent or shares, key=lambda share: (share.used, share.waiting[0].arrival))
        self._level = max(self._level, min(share.used for share in shares))
        ticket = heapq.heappop(chosen.waiting)
        # A share without debt says no more than a new one would.
        for client in [
            c for c, s in self._shares.items() if not s.waiting and s.used <= self._level and s is not chosen
        ]:
            del self._shares[client]
        return ticket

    def pop_company(self, joins: Callable[[T], bool]) -> list[Ticket[T]]:
        """Further steps of conversations that join those taken before, of all clients, in the order of their turns.

        No item of a client goes before another that this client has put in earlier.
        """
        company = []
        for share in sorted(self._shares.values(), key=lambda share: share.used):
            for ticket in sorted(share.waiting):
                if ticket.priority != 0 or not joins(ticket.item):
                    break
                company.append(heapq.heappop(share.waiting))
        return company

    def charge(self, client: str, seconds: float) -> None:
        """Counts what an item of a client took."""
        if client in self._shares:
            self._shares[client].used += seconds
        if not any(share.waiting for share in self._shares.values()):
            self._shares.clear()  # nobody waits, so nobody was kept waiting: all begin anew
        elif len(self._shares) > _MAX_SHARES:
            self._shares = {name: share for name, share in self._shares.items() if share.waiting}

    def discard(self, ticket: Ticket[T]) -> None:
        """Takes an item out that need not run any more; does nothing if it is out already."""
        share = self._shares.get(ticket.client)
        if share is not None and ticket in share.waiting:
            share.waiting.remove(ticket)
            heapq.heapify(share.waiting)

    def ahead(self, key: Hashable) -> int | None:
        """About how many items run before the one put under `key`, if clients take turns; None if it does not wait."""
        for share in self._shares.values():
            for ticket in share.waiting:
                if ticket.key == key:
                    own = sum(other < ticket for other in share.waiting)
                    others = sum(min(len(s.waiting), own + 1) for s in self._shares.values() if s is not share)
                    return own + others
        return None
