"""Joining a swarm by its initial peers, and finding lost peers again.

`DHTNode.create` can join too, but gives up if the clock of one initial peer differs, even if others could be used.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from contextlib import suppress

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

_OTHERS_TIMEOUT = 1.0  # seconds for the other initial peers, once one has answered
_MAX_KNOWN = 64
_TIMES = re.compile(r"local: ([\d.]+), peer: ([\d.]+)")


class ClockError(RuntimeError):
    """The clocks of peers differ from this machine's by more than hivemind allows; the message says by how much.

    Records in the DHT expire at a time that all peers must agree on.
    """


async def meet(dht: DHTNode, initial_peers: Sequence[str]) -> None:
    """Joins the DHT by the peers that answer; one is enough.

    Args:
        dht: a node that was created without `initial_peers`.
        initial_peers: multiaddresses.

    Raises:
        ClockError: no peer can be used, at least one of them because of its clock or this machine's.
        RuntimeError: no peer answers, or none can call this peer back.
    """
    peers = {PeerID.from_base58(Multiaddr(maddr)["p2p"]) for maddr in initial_peers}
    refusals: list[str] = []
    has_joined = False
    async with asyncio.TaskGroup() as tasks:
        pings = [tasks.create_task(_ping(dht, peer)) for peer in peers]
        for ping in asyncio.as_completed(pings):
            if (refusal := await ping) is None:
                has_joined = True
                await asyncio.wait(pings, timeout=_OTHERS_TIMEOUT)
                break
            refusals.append(refusal)
        for task in pings:
            task.cancel()
    if not has_joined:
        clocks = next(filter(None, map(_TIMES.search, refusals)), None)
        if clocks is not None:
            ahead = float(clocks[1]) - float(clocks[2])
            raise ClockError(f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'}")
        raise RuntimeError(next(filter(None, refusals), "no answer to a ping"))
    nearest = asyncio.create_task(dht.find_nearest_nodes([dht.node_id]))  # these peers will keep its records
    await asyncio.wait([nearest], timeout=_OTHERS_TIMEOUT)


async def _ping(dht: DHTNode, peer: PeerID) -> str | None:
    """Calls a peer. Returns None if it can be used, else the reason ("": no answer)."""
    try:
        answer = await dht.protocol.call_ping(peer, validate=True, strict=True)
    except ValidationError as e:
        return str(e)
    return None if answer is not None else ""


class KnownPeers:
    """Peers that this one has met, so that they find each other again after an outage.

    hivemind forgets a peer at the first unanswered call, and calls `initial_peers` only once. Without this class, a
    peer whose swarm was away for some seconds would never find it again, nor would two halves of a swarm.

    Args:
        p2p, dht: of this peer.
        initial_peers: multiaddresses; these peers are never forgotten.
    """

    def __init__(self, p2p: P2P, dht: DHTNode, initial_peers: Sequence[str]):
        self._p2p, self._dht = p2p, dht
        self._initial: dict[PeerID, list[Multiaddr]] = {}
        for maddr in map(Multiaddr, initial_peers):
            peer = maddr["p2p"]
            self._initial.setdefault(PeerID.from_base58(peer), []).append(maddr.decapsulate(Multiaddr(f"/p2p/{peer}")))
        self._others: dict[PeerID, None] = {}  # the newest is last

    async def meet_again(self) -> None:
        """Calls known peers that the DHT has lost.

        A peer that others should find also calls its initial peers, which no longer know it after a restart.
        """
        known = self._dht.protocol.routing_table.peer_id_to_uid
        lost = [peer for peer in {**self._initial, **self._others} if peer not in known]
        if not self._dht.protocol.client_mode:
            lost = list(dict.fromkeys([*self._initial, *lost]))
        for peer in known:
            self._others.pop(peer, None)
            self._others[peer] = None
        for peer in list(self._others)[:-_MAX_KNOWN]:
            del self._others[peer]
        async with asyncio.TaskGroup() as calls:
            for peer in lost:
                calls.create_task(self._call(peer))

    async def _call(self, peer: PeerID) -> None:
        try:
            if (maddrs := self._initial.get(peer)) is not None:  # the daemon remembers the addresses of the others
                with suppress(ControlFailure, P2PDaemonError, OSError):
                    await self._p2p._client.connect(peer, maddrs)
            await self._dht.protocol.call_ping(peer)  # with an answer, each adds the other to its table
        except (OSError, RuntimeError, P2PDaemonError) as e:
            logger.info("a lost peer could not be called: %s", e)
