"""Swarms that already run: a private one, or the public one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petals_lightning.errors import ConfigurationError
from petals_lightning.strategies.swarm_provider import ServedModel, SwarmProvider
from petals_lightning.swarm.node import split_maddrs
from petals_lightning.swarm.public import PUBLIC_INITIAL_PEERS, PUBLIC_NOTICE

log = logging.getLogger(__name__)


class PrivateSwarm(SwarmProvider):
    """A swarm of machines that you or your lab run.

    Args:
        initial_peers: multiaddresses of one or more of its peers (also as one text with commas or blanks between);
            servers print theirs when they start.
        **options: of `SwarmProvider`, and of `ClientConfig`.

    Raises:
        ConfigurationError: the list is empty, or an entry is not a multiaddress.
    """

    def __init__(self, initial_peers: str | Sequence[str], **options: Any):
        super().__init__(**options)
        if not initial_peers:
            raise ConfigurationError(
                "initial_peers is empty; give the multiaddress that a server of your swarm prints at its start: "
                "initial_peers=[/ip4/HOST/tcp/PORT/p2p/ID]"
            )
        self.initial_peers = split_maddrs(initial_peers)
        for peer in self.initial_peers:
            if not peer.startswith("/") or "/p2p/" not in peer:
                raise ConfigurationError(
                    f"initial_peers: {peer!r} is no multiaddress; it has the form /ip4/HOST/tcp/PORT/p2p/ID"
                )

    def _arguments(self, model: ServedModel) -> dict[str, Any]:
        return {"initial_peers": self.initial_peers, "dht_prefix": model.dht_prefix}


class PublicSwarm(PrivateSwarm):
    """The public Petals network, or another that strangers serve.

    Args:
        initial_peers: None takes the network's own bootstrap peers.
        **options: of `SwarmProvider`, and of `ClientConfig`.
    """

    def __init__(self, initial_peers: str | Sequence[str] | None = None, **options: Any):
        super().__init__(initial_peers or PUBLIC_INITIAL_PEERS, **options)

    def _start(self, model: ServedModel, log_dir: Path) -> None:
        log.warning("swarm=public: %s (swarm=private)", PUBLIC_NOTICE)
