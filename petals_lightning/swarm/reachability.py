"""Whether others can call this peer: it asks some to try.

libp2p has such a check (AutoNAT), but answers after a quarter of a minute at best, and its daemon does not tell the
answer. Here a peer opens a TCP connection to the address from which it is asked, so nobody can have it call anybody
else, and at the port that it is asked for. It looks for libp2p's greeting there.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from contextlib import suppress

from google.protobuf.wrappers_pb2 import BoolValue, UInt32Value
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.utils.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

CALL_METHOD = "petals_lightning.call_back"

_GREETING = b"\x13/multistream/"
_DIAL_TIMEOUT = 3.0  # seconds
_ANSWER_TIMEOUT = 10.0  # seconds
_MAX_DIALS = 8  # for other peers at once
_MAX_PEERS, _MAX_PORTS = 5, 3


class CallBack:
    """Answers peers that ask whether this one can call them.

    Args:
        p2p: this peer.
    """

    def __init__(self, p2p: P2P):
        self._p2p, self._dials = p2p, 0

    async def register(self) -> None:
        await self._p2p.add_protobuf_handler(CALL_METHOD, self._answer, UInt32Value)

    async def _answer(self, request: UInt32Value, context: P2PContext) -> BoolValue:
        """Raises ValueError, which the caller sees, if it cannot be known."""
        host = await self._host(context.remote_id)
        if host is None or self._dials >= _MAX_DIALS:
            raise ValueError("cannot say")
        self._dials += 1
        try:
            return BoolValue(value=await _greets(host, request.value))
        finally:
            self._dials -= 1

    async def _host(self, peer: PeerID) -> str | None:
        """The IP address of the connection to a peer; None if it passes a relay."""
        for info in await self._p2p.list_peers():
            for maddr in info.addrs if info.peer_id == peer else ():
                if (host := _host_of(maddr)) is not None:
                    return host
        return None


async def can_be_called(p2p: P2P, others: Iterable[PeerID], maddrs: Iterable[Multiaddr]) -> bool | None:
    """Whether most of the peers that can say it can call this one; None if nobody can say.

    Args:
        p2p: this peer.
        others: peers to ask; a few are drawn from them.
        maddrs: the addresses of this one.
    """
    ports = list(dict.fromkeys(int(maddr["tcp"]) for maddr in maddrs if _host_of(maddr) is not None and "tcp" in maddr))
    peers = list(others)
    asked = random.sample(peers, min(len(peers), _MAX_PEERS))
    answers = await asyncio.gather(*(_ask(p2p, peer, ports[:_MAX_PORTS]) for peer in asked))
    known = [answer for answer in answers if answer is not None]
    logger.debug("of %d peers %d could call this one, %d could not", len(asked), sum(known), len(known) - sum(known))
    return 2 * sum(known) > len(known) if known else None


async def _ask(p2p: P2P, peer: PeerID, ports: list[int]) -> bool | None:
    """Whether a peer can call this one at some of the ports; None if it does not say."""
    answers = []
    for port in ports:
        with suppress(P2PHandlerError, P2PDaemonError, OSError):  # also of older versions, which have no such method
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                answer = await p2p.call_protobuf_handler(peer, CALL_METHOD, UInt32Value(value=port), BoolValue)
                answers.append(answer.value)
    return any(answers) if answers else None


async def _greets(host: str, port: int) -> bool:
    """Whether a libp2p peer listens there."""
    if not 0 < port < 1 << 16:
        return False
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                return await reader.readexactly(len(_GREETING)) == _GREETING
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return False


def relay_of(maddr: Multiaddr) -> PeerID | None:
    """The relay that calls to an address pass; None if they pass none."""
    before, circuit, _ = str(maddr).partition("/p2p-circuit")
    return PeerID.from_base58(before.rpartition("/")[2]) if circuit else None


def _host_of(maddr: Multiaddr) -> str | None:
    if relay_of(maddr) is not None:
        return None
    return next((maddr[name] for name in ("ip4", "ip6") if name in maddr), None)
