"""What the page shows of a swarm: how it is now, and servers that were there a while ago."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from petals_lightning.client.overview import look, weak_spots
from petals_lightning.swarm import SwarmNode

_FRESH = 5.0  # seconds for which a look is good enough for everybody
_REMEMBERED = 3600.0  # seconds for which a server that has gone is shown


class SwarmWatch:
    """Looks at a swarm when somebody asks. `look` may be called from any thread.

    Args:
        node: this process's peer, started.
        prefixes: the models to show first, or alone.
        num_blocks: of those models, if they are not listed.
        others: show all other models of the swarm, too.
        token: the swarm's secret, if it has one.
    """

    def __init__(
        self,
        node: SwarmNode,
        prefixes: Sequence[str] = (),
        num_blocks: int | None = None,
        *,
        others: bool = True,
        token: str | None = None,
    ):
        self._node, self._prefixes, self._num_blocks = node, tuple(prefixes), num_blocks
        self._others, self._token = others, token
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._found: dict[str, Any] = {}
        self._answered: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}  # by model and peer: when, and what

    def look(self) -> dict[str, Any]:
        """The swarm as docs/api.md describes it. It may be some seconds old.

        Raises:
            SwarmError: this process has lost the swarm.
        """
        with self._lock:
            if time.monotonic() - self._looked_at > _FRESH:
                self._node.check_alive()
                models, listed = look(
                    self._node, self._prefixes, self._num_blocks, others=self._others, token=self._token
                )
                for model in models:
                    self._add_history(model)
                self._found = {"time": time.time(), "models_listed": listed, "models": models}
                self._looked_at = time.monotonic()
            return self._found

    def _add_history(self, model: dict[str, Any]) -> None:
        """Adds weak spots, `last_seen` of each server, and the servers that have gone."""
        now, prefix = time.monotonic(), model["dht_prefix"]
        model["weak_spots"] = weak_spots(model)
        here = {server["peer_id"]: server for server in model["servers"]}
        for peer, server in here.items():
            if server["round_trip"] is not None:
                self._answered[prefix, peer] = now, dict(server)
            answered, _ = self._answered.get((prefix, peer), (None, {}))
            server["last_seen"] = round(now - answered, 1) if answered is not None else None
        self._answered = {key: seen for key, seen in self._answered.items() if now - seen[0] < _REMEMBERED}
        model["gone_servers"] = [
            {**server, "round_trip": None, "open_requests": None, "last_seen": round(now - answered, 1)}
            for (of, peer), (answered, server) in self._answered.items()
            if of == prefix and peer not in here
        ]
        model["servers"].sort(key=lambda server: (server["round_trip"] is not None, server["held_blocks"]))
