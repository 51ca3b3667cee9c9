"""The methods of a Petals server, with the names and types that hivemind derives from these classes.

`TransformerConnectionHandler.get_stub(p2p, peer)` calls them. The classes answer nothing: a server registers its own
handlers under `method_name(...)`.
"""

from __future__ import annotations

from typing import AsyncIterator  # noqa: UP035 (hivemind knows streams by typing's name)

from hivemind.p2p import P2PContext, ServicerBase
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.p2p.p2p_daemon_bindings.control import MAX_UNARY_PAYLOAD_SIZE
from hivemind.proto import dht_pb2
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID

MAX_PART_BYTES = DEFAULT_MAX_MSG_SIZE
"""Limit of a tensor's bytes in one message of a stream."""
MAX_UNARY_BYTES = MAX_UNARY_PAYLOAD_SIZE
"""Requests with more bytes of tensors need the `_stream` methods; so do requests with larger answers."""


class TransformerConnectionHandler(ServicerBase):
    """Blocks of a model. The class's name is part of the protocol."""

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        raise NotImplementedError

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield ExpertResponse()

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield ExpertResponse()

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        raise NotImplementedError
        yield ExpertResponse()

    async def rpc_push(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        raise NotImplementedError


class ReachabilityProtocol(ServicerBase):
    """Whether a peer can be reached by its id. The class's name is part of the protocol."""

    async def rpc_check(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        raise NotImplementedError


def method_name(name: str) -> str:
    """The wire name of a Petals server's method `rpc_…`."""
    return f"{TransformerConnectionHandler.__name__}.{name}"
