"""Swarms of servers in this process, which start quickly; for servers in processes of their own see `servers`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petals_lightning.hf import Checkpoint
from petals_lightning.models import remote_blocks
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.running_server import RunningServer
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
PREFIX = "tiny"
SERVERS = ("ours", "petals", "mixed", "split")
"""Kinds of swarms: our servers, such that offer Petals' methods alone, both by turns, ours on two devices each."""
TWO_DEVICES = ("cpu", "cpu")


def is_petals_only(servers: str, number: int) -> bool:
    """Whether a server, counted from 0, offers Petals' methods alone in a swarm of that kind."""
    return servers == "petals" or (servers == "mixed" and number % 2 == 1)


def serve_options(servers: str, number: int) -> tuple[str, ...]:
    """What `petals-lightning serve` is told for that server."""
    if servers == "split":
        return "--devices", ",".join(TWO_DEVICES)
    return ("--petals-only",) if is_petals_only(servers, number) else ()


class InProcessSwarm:
    """Servers with peers of their own (each with its libp2p daemon), all in this process.

    Args:
        checkpoint: the model.
        spans: blocks of each server.
        dtype, limits, rules, prefix: for all servers.
        servers: one of `SERVERS`.
        share_prefix, device, devices, throughput: as of `ServerConfig`.
        quant_types: of each server's weights; none is quantised by default.
        adapters: for each server those that it holds; none by default.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        spans: Sequence[tuple[int, int]],
        *,
        dtype: str = "auto",
        limits: ServerLimits | None = None,
        rules: AccessRules | None = None,
        prefix: str = PREFIX,
        initial_peers: Sequence[str] = (),
        servers: str = "ours",
        share_prefix: bool = True,
        device: str = "cpu",
        devices: Sequence[str] | None = None,
        throughput: float | None = None,
        adapters: Sequence[Sequence[Path | str]] = (),
        quant_types: Sequence[str] | None = None,
    ):
        self._checkpoint, self._spans, self._kind, self._dtype = str(checkpoint), spans, servers, dtype
        self._limits, self._prefix, self._initial_peers = limits, prefix, initial_peers
        self._rules, self._share_prefix, self._device = rules, share_prefix, device
        self._devices = tuple(devices) if devices is not None else TWO_DEVICES if servers == "split" else None
        self._throughput, self._quant_types = throughput, quant_types or [UNQUANTIZED] * len(spans)
        self._adapters = adapters or [()] * len(spans)
        self.servers: list[RunningServer] = []
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()  # their blocks; of what a test drops nothing is kept
        self._client: SwarmNode | None = None

    def load(self, auto_class: Any, *, shared_peer: bool = False, **options: Any) -> Any:
        """The model through this swarm, by a peer of its own or by one for all; it is closed with the swarm."""
        if shared_peer:
            if self._client is None:
                self._client = SwarmNode(self.initial_peers, host_maddrs=(), client_mode=True).start()
            options["node"] = self._client
        elif "initial_peers" not in options:
            options["initial_peers"] = self.initial_peers
        options = {"dht_prefix": self._prefix, **options}
        model = auto_class.from_pretrained(self._checkpoint, **options)
        self._models.add(remote_blocks(model))
        return model

    @property
    def initial_peers(self) -> list[str]:
        return self.servers[0].node.visible_maddrs()

    @property
    def by_id(self) -> dict[str, RunningServer]:
        """The servers by their peers' ids."""
        return {server.node.peer_id.to_base58(): server for server in self.servers}

    def __enter__(self) -> InProcessSwarm:
        for number, span in enumerate(self._spans):
            peers = self.initial_peers if self.servers else self._initial_peers
            server = Server(
                Checkpoint(self._checkpoint),
                SwarmNode(peers, host_maddrs=LOOPBACK),
                config=ServerConfig(
                    **vars(self._limits or ServerLimits()),
                    block_indices=span,
                    dht_prefix=self._prefix,
                    dtype=self._dtype,
                    quant_type=self._quant_types[number],
                    petals_only=is_petals_only(self._kind, number),
                    share_prefix=self._share_prefix,
                    device=self._device if self._devices is None else None,
                    devices=self._devices,
                    throughput=self._throughput,
                    adapters=tuple(map(str, self._adapters[number])),
                    update_period=30,
                ),
                rules=self._rules,
            )
            self.servers.append(server.start())
        return self

    def __exit__(self, *exc_info: object) -> None:
        for layers in list(self._models):
            layers.close()
        if self._client is not None:
            self._client.close()
        for server in reversed(self.servers):
            server.stop(timeout=1)
