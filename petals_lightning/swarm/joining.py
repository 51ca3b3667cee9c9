"""Meeting the first peers of a swarm.

`DHTNode.create` does the same, but gives up where one of them has another clock, even if others would do.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

_OTHER_PEERS_PATIENCE = 1.0  # seconds for the others among the peers to join by, once one has answered
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
