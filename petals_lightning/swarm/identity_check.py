"""Checks whether a peer with this one's identity is already running.

libp2p takes two peers with one key for the same peer: calls reach sometimes one and sometimes the other, and some are
never answered. Neither peer would notice, so the second one checks before it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from petals_lightning.errors import ConfigurationError
from petals_lightning.swarm.daemon import P2PDaemon, read_identity

_ANSWERS = 3  # prove that it runs: a process that was just killed may still seem to be there
_SILENCES = 2  # prove that it does not: other peers may not know yet of one that has just joined
_PERIOD = 1.0  # seconds between two calls
_DIAL_TIMEOUT = 5.0  # seconds for a peer to be found and to answer


async def check_identity_is_free(path: str, initial_peers: Sequence[str], start_timeout: float) -> None:
    """Looks in the swarm for a peer with the identity in a file. Does nothing if the file does not exist yet.

    Raises:
        ConfigurationError: such a peer answers, or the file holds no key.
        SwarmConnectionError: the swarm cannot be reached, or the file cannot be read.
    """
    if not Path(path).is_file():
        return
    peer = PeerID.from_base58(read_identity(path).peer_id)
    daemon = await P2PDaemon(
        initial_peers=initial_peers,
        host_maddrs=(),
        announce_maddrs=(),
        identity_path=None,
        dht_server=False,
        start_timeout=start_timeout,
    ).start()
    try:
        answers: list[bool] = []
        while answers.count(True) < _ANSWERS:
            if answers:
                await asyncio.sleep(_PERIOD)
            answers.append(await _answers(daemon.p2p, peer))
            if answers.count(False) == _SILENCES:
                return
    finally:
        await daemon.stop()
    raise ConfigurationError(
        f"the identity file {path!r} is in use: a peer of its id, {peer.to_base58()}, runs in this swarm. Two peers "
        "with one identity take each other's calls: stop that one, or give this one a file of its own (the name of one "
        "that does not exist yet, where a key will be made)"
    )


async def _answers(p2p: P2P, peer: PeerID) -> bool:
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT):
            await p2p._client.connect(peer, [])
    except (TimeoutError, ControlFailure, P2PDaemonError):
        return False
    return True
