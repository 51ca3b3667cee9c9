"""What each client has open on this server, over all its streams, against its limits. Pure accounting."""

from __future__ import annotations

from dataclasses import dataclass

from petals_lightning.server.access.limits import ServerLimits, room_for


@dataclass
class ClientUsage:
    """What one client, by its authenticated peer id, uses: open streams, open requests, bytes on the server."""

    streams: int = 0
    requests: int = 0
    num_bytes: int = 0


class Quotas:
    """The usage of all clients, checked against the limits.

    A method that grants something returns a message if it does not: either the client has too much open, or the server
    is full.

    Attributes:
        clients: those with anything open, by peer id. A client that has left takes no memory here.
        num_bytes, streams: of all clients.
    """

    def __init__(self, limits: ServerLimits):
        self._limits, self._max_streams = limits, limits.all_streams
        self.clients: dict[str, ClientUsage] = {}
        self.num_bytes = self.streams = 0

    def open_stream(self, peer: str) -> ClientUsage | str:
        """Counts one more stream of a client."""
        limit = self._limits.max_streams_per_client
        if (usage := self.clients.get(peer, ClientUsage())).streams >= limit:
            return f"this client has {limit} streams open, which is the limit: close models that it needs no more"
        return self._add_stream(peer, usage) or usage

    def close_stream(self, peer: str) -> None:
        self.clients[peer].streams -= 1
        self.streams -= 1
        self._forget_if_idle(peer)

    def open_call(self, peer: str) -> ClientUsage | str:
        """Counts one more request that has a stream to itself; close it as both."""
        if isinstance(usage := self.open_request(peer), str):
            return usage
        if refusal := self._add_stream(peer, usage):
            self.close_request(peer)
            return refusal
        return usage

    def open_request(self, peer: str) -> ClientUsage | str:
        """Counts one more request that belongs to none of our streams."""
        usage = self.clients.get(peer, ClientUsage())
        if usage.requests >= (limit := self._limits.max_open_requests):
            return f"this client has {limit} requests open, which is the limit"
        usage.requests += 1
        self.clients[peer] = usage
        return usage

    def close_request(self, peer: str) -> None:
        self.clients[peer].requests -= 1
        self._forget_if_idle(peer)

    def reserve(self, usage: ClientUsage, num_bytes: int) -> str | None:
        """Counts bytes that a client takes. If they do not fit, counts nothing and returns the reason."""
        limit, total = self._limits.max_client_bytes, self._limits.max_total_bytes
        if usage.num_bytes + num_bytes > limit:
            return f"this client has {_mib(usage.num_bytes)} MiB open, its limit is {_mib(limit)} MiB"
        if num_bytes > room_for(usage.num_bytes, taken=self.num_bytes, budget=total):
            return (
                f"this server is full: {_mib(self.num_bytes)} of {_mib(total)} MiB are taken, and the rest is for "
                "clients that hold less"
            )
        usage.num_bytes += num_bytes
        self.num_bytes += num_bytes
        return None

    def release(self, usage: ClientUsage, num_bytes: int) -> None:
        usage.num_bytes -= num_bytes
        self.num_bytes -= num_bytes

    def _add_stream(self, peer: str, usage: ClientUsage) -> str | None:
        if not room_for(usage.streams, taken=self.streams, budget=self._max_streams):
            return (
                f"this server is full: {self.streams} of {self._max_streams} streams are open, and the rest is for "
                "clients that hold less"
            )
        usage.streams += 1
        self.streams += 1
        self.clients[peer] = usage
        return None

    def _forget_if_idle(self, peer: str) -> None:
        usage = self.clients[peer]
        if usage.streams == usage.requests == 0:
            del self.clients[peer]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.4g}"
