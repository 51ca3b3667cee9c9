"""Meeting the first peers of a swarm, and meeting peers again.

`DHTNode.create` meets the first ones, too, but gives up where one of them has another clock, even if others would do.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

_OTHER_PEERS_PATIENCE = 1.0  # seconds for the others among the peers to join by, once one has answered
_MOST_ACQUAINTANCES = 64
_TIMES = re.compile(r"local: ([\d.]+), peer: ([\d.]+)")


class ClockError(RuntimeError):
    """Peers answer, but their clocks differ from this machine's by more than hivemind allows; `str` says by how much.

    Records in the DHT end at a time that all peers must agree on.
    """


async def meet(dht: DHTNode, initial_peers: Sequence[str]) -> None:
    """Enters the DHT by those of the peers that answer; one is enough.

    Args:
        dht: a node that was created without `initial_peers`.
        initial_peers: multiaddresses.

    Raises:
        ClockError: none can be used, and at least one because of its clock or this machine's.
        RuntimeError: none answers, or none can call this peer back.
    """
    peers = {PeerID.from_base58(Multiaddr(maddr)["p2p"]) for maddr in initial_peers}
    pings = [asyncio.create_task(dht.protocol.call_ping(peer, validate=True, strict=True)) for peer in peers]
    refusals = []
    for ping in asyncio.as_completed(pings):
        try:
            if await ping is not None:
                break
        except ValidationError as error:
            refusals.append(str(error))
    else:
        clocks = next(filter(None, map(_TIMES.search, refusals)), None)
        if clocks is not None:
            ahead = float(clocks[1]) - float(clocks[2])
            raise ClockError(f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'}")
        raise RuntimeError(refusals[0] if refusals else "no answer to a ping")
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*pings, return_exceptions=True), _OTHER_PEERS_PATIENCE)
    # Its own neighbours, who will keep its records.
    nearest = asyncio.create_task(dht.find_nearest_nodes([dht.node_id]))
    await asyncio.wait([nearest], timeout=_OTHER_PEERS_PATIENCE)


class Acquaintances:
    """Peers that this one has met, so that they meet again after an outage.

    hivemind forgets a peer with the first call that it leaves unanswered, and calls `initial_peers` once only: without
    this, a peer whose swarm was away for some seconds, or two halves of a swarm, would be strangers for ever.

    Args:
        p2p, dht: of this peer.
        initial_peers: multiaddresses; these are never forgotten.
    """

    def __init__(self, p2p: P2P, dht: DHTNode, initial_peers: Sequence[str]):
        self._p2p, self._dht = p2p, dht
        self._initial: dict[PeerID, list[Multiaddr]] = {}
        for maddr in map(Multiaddr, initial_peers):
            peer = maddr["p2p"]
            self._initial.setdefault(PeerID.from_base58(peer), []).append(maddr.decapsulate(Multiaddr(f"/p2p/{peer}")))
        self._others: dict[PeerID, None] = {}  # the newest last

    async def meet_again(self) -> None:
        """Calls those that are out of the DHT's sight.

        A peer that others should find also calls its initial peers: after a restart they do not know it any more.
        """
        known = self._dht.protocol.routing_table.peer_id_to_uid
        lost = [peer for peer in {**self._initial, **self._others} if peer not in known]
        if not self._dht.protocol.client_mode:
            lost = list(dict.fromkeys([*self._initial, *lost]))
        for peer in known:
            self._others.pop(peer, None)
            self._others[peer] = None
        for peer in list(self._others)[:-_MOST_ACQUAINTANCES]:
            del self._others[peer]
        await asyncio.gather(*(self._call(peer) for peer in lost))

    async def _call(self, peer: PeerID) -> None:
        if (maddrs := self._initial.get(peer)) is not None:  # the addresses of others are the daemon's to remember
            with suppress(ControlFailure, P2PDaemonError, OSError):
                await self._p2p._client.connect(peer, maddrs)
        await self._dht.protocol.call_ping(peer)  # on an answer each of the two takes in the other
