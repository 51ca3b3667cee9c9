"""Finds out whether a peer with this one's identity runs already.

libp2p takes two peers with one key for the same peer: calls reach now one and now the other, and some are never
answered. Neither of them would notice, so the second one asks before it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from petals_lightning.errors import ConfigurationError
from petals_lightning.swarm.daemon import P2PDaemon, read_identity

_ANSWERS = 3  # that show that it runs: a process that was killed a moment ago may still seem to be there
_SILENCES = 2  # that show that it does not: others may not have heard yet of one that has just joined
_PERIOD = 1.0  # seconds between two tries
_DIAL_TIMEOUT = 5.0  # seconds for a peer to be found and to answer


async def check_identity_is_free(path: str, initial_peers: Sequence[str], start_timeout: float) -> None:
    """Looks in the swarm for a peer with the identity in a file; does nothing if there is no such file yet.

    Raises:
        ConfigurationError: one answers; or the file holds no key.
        SwarmConnectionError: the swarm cannot be reached, or the file not be read.
    """
    if not Path(path).is_file():
        return
    peer = PeerID.from_base58(read_identity(path).peer_id)
    stranger = P2PDaemon(
        initial_peers=initial_peers, host_maddrs=(), announce_maddrs=(), identity_path=None, dht_server=False,
        start_timeout=start_timeout,
    )  # fmt: skip
    try:
        p2p = await stranger.start()
        answers: list[bool] = []
        while answers.count(True) < _ANSWERS:
            if answers:
                await asyncio.sleep(_PERIOD)
            answers.append(await _answers(p2p, peer))
            if answers.count(False) == _SILENCES:
                return
    finally:
        await stranger.stop()
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
