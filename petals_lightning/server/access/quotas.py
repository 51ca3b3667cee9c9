"""What each client has open on this server, over all its streams, against what it is granted. Pure accounting."""

from __future__ import annotations

from dataclasses import dataclass

from petals_lightning.server.access.limits import ServerLimits, room_for


@dataclass
class Account:
    """Of one client, by its authenticated peer id: open streams, open requests, bytes that it has on the server."""

    streams: int = 0
    requests: int = 0
    num_bytes: int = 0


class Accounts:
    """The accounts of all clients. A client with nothing open has none, so strangers who leave cost nothing.

    Methods that grant something return why not where they do not: whether it is the client that has too much open, or
    the server that is full.
    """

    def __init__(self, limits: ServerLimits):
        self._limits, self._max_streams = limits, limits.all_streams
        self._accounts: dict[str, Account] = {}
        self.num_bytes = self.streams = 0

    def open_stream(self, peer: str) -> Account | str:
        """The client's account with a stream more."""
        limit = self._limits.max_streams_per_client
        if (account := self._accounts.get(peer, Account())).streams >= limit:
            return f"this client has {limit} streams open, which is the limit: close models that it needs no more"
        return self._enter(peer, account) or account

    def close_stream(self, peer: str) -> None:
        self._accounts[peer].streams -= 1
        self.streams -= 1
        self._forget_if_idle(peer)

    def open_call(self, peer: str) -> Account | str:
        """The client's account with a request more that has a stream to itself; to be closed as both."""
        if isinstance(account := self.open_request(peer), str):
            return account
        if refusal := self._enter(peer, account):
            self.close_request(peer)
            return refusal
        return account

    def open_request(self, peer: str) -> Account | str:
        """The client's account with a request more, which belongs to no stream of ours."""
        account = self._accounts.get(peer, Account())
        if account.requests >= (limit := self._limits.max_open_requests):
            return f"this client has {limit} requests open, which is the limit"
        account.requests += 1
        self._accounts[peer] = account
        return account

    def close_request(self, peer: str) -> None:
        self._accounts[peer].requests -= 1
        self._forget_if_idle(peer)

    def reserve(self, account: Account, num_bytes: int) -> str | None:
        """Counts bytes that a client takes; says why not, and counts nothing, if there is no room for them."""
        limit, total = self._limits.max_client_bytes, self._limits.max_total_bytes
        if account.num_bytes + num_bytes > limit:
            return f"this client has {_mib(account.num_bytes)} MiB open, its limit is {_mib(limit)} MiB"
        if num_bytes > room_for(account.num_bytes, taken=self.num_bytes, budget=total):
            return (
                f"this server is full: {_mib(self.num_bytes)} of {_mib(total)} MiB are taken, and the rest is for "
                "clients that hold less"
            )
        account.num_bytes += num_bytes
        self.num_bytes += num_bytes
        return None

    def release(self, account: Account, num_bytes: int) -> None:
        account.num_bytes -= num_bytes
        self.num_bytes -= num_bytes

    def _enter(self, peer: str, account: Account) -> str | None:
        if not room_for(account.streams, taken=self.streams, budget=self._max_streams):
            return (
                f"this server is full: {self.streams} of {self._max_streams} streams are open, and the rest is for "
                "clients that hold less"
            )
        account.streams += 1
        self.streams += 1
        self._accounts[peer] = account
        return None

    def _forget_if_idle(self, peer: str) -> None:
        account = self._accounts[peer]
        if account.streams == account.requests == 0:
            del self._accounts[peer]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.4g}"
