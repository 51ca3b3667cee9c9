"""What each client has open on this server, over all its streams, against what it is granted. Pure accounting."""

from __future__ import annotations

from dataclasses import dataclass

from petals_lightning.server.limits import ServerLimits


@dataclass
class Account:
    """Of one client, by its authenticated peer id: open streams, open requests, bytes received and not yet answered."""

    streams: int = 0
    requests: int = 0
    num_bytes: int = 0


class Accounts:
    """The accounts of all clients. A client with nothing open has none, so strangers who leave cost nothing."""

    def __init__(self, limits: ServerLimits):
        self._limits = limits
        self._accounts: dict[str, Account] = {}
        self.num_bytes = 0

    def open_stream(self, peer: str) -> Account | None:
        """The client's account with a stream more; None if it has as many as it may have."""
        account = self._accounts.setdefault(peer, Account())
        if account.streams >= self._limits.max_streams_per_client:
            return None
        account.streams += 1
        return account

    def close_stream(self, peer: str) -> None:
        self._accounts[peer].streams -= 1
        self._forget_if_idle(peer)

    def open_request(self, peer: str) -> Account | None:
        """The client's account with a request more, which belongs to no stream of ours; None if it has too many."""
        account = self._accounts.setdefault(peer, Account())
        if account.requests >= self._limits.max_open_requests:
            return None
        account.requests += 1
        return account

    def close_request(self, peer: str) -> None:
        self._accounts[peer].requests -= 1
        self._forget_if_idle(peer)

    def reserve(self, account: Account, num_bytes: int) -> bool:
        """Counts bytes that a client is about to send; False, and nothing counted, if there is no room for them."""
        if (
            account.num_bytes + num_bytes > self._limits.max_client_bytes
            or self.num_bytes + num_bytes > self._limits.max_total_bytes
        ):
            return False
        account.num_bytes += num_bytes
        self.num_bytes += num_bytes
        return True

    def release(self, account: Account, num_bytes: int) -> None:
        account.num_bytes -= num_bytes
        self.num_bytes -= num_bytes

    def _forget_if_idle(self, peer: str) -> None:
        account = self._accounts[peer]
        if account.streams == account.requests == 0:
            del self._accounts[peer]
