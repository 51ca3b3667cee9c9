"""Tells peers whether they or others can be reached. Petals servers ask this before they announce themselves."""

from __future__ import annotations

import logging

from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2

from petals_lightning.protocol.petals.methods import ReachabilityProtocol
from petals_lightning.server.access.rules import Gate
from petals_lightning.server.resources import ServerResources

logger = logging.getLogger(__name__)

CALL_ERRORS = (P2PHandlerError, P2PDaemonError, OSError, ValueError)
"""Errors of a call to another peer. ValueError: the peer id is malformed. TimeoutError is an OSError."""

_TIMEOUT = 5.0  # seconds
_MAX_CHECKS = 8  # of other peers at once


class Reachability:
    """Answers ReachabilityProtocol.

    Args:
        resources: of the server.
        p2p: this server's peer.
    """

    def __init__(self, resources: ServerResources, p2p: P2P):
        self._resources, self._p2p, self._checks = resources, p2p, 0

    async def register(self) -> None:
        """Adds the method to this server's peer."""
        await ReachabilityProtocol().add_p2p_handlers(self._p2p, wrapper=self)

    async def unregister(self) -> None:
        """Takes the method from this server's peer."""
        await ReachabilityProtocol().remove_p2p_handlers(self._p2p)

    async def rpc_check(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        """Whether a peer can be reached: this one, or another, which it calls on behalf of the caller."""
        target, caller = PeerID(request.peer.node_id), context.remote_id.to_base58()
        if target == context.local_id:
            return dht_pb2.PingResponse(available=True)
        gate = Gate(self._resources.rules, caller, self._resources.peer_id)
        if not gate.is_open or self._checks >= _MAX_CHECKS:
            return dht_pb2.PingResponse(available=False)
        self._checks += 1
        try:
            answer = await ReachabilityProtocol.get_stub(self._p2p, target).rpc_check(request, timeout=_TIMEOUT)
            return dht_pb2.PingResponse(available=answer.available)
        except CALL_ERRORS as e:
            logger.debug("…%s asked for …%s, which cannot be reached: %r", caller[-6:], str(target)[-6:], e)
            return dht_pb2.PingResponse(available=False)
        finally:
            self._checks -= 1
