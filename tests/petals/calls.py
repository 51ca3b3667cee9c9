"""Calls of a server's Petals methods over real libp2p, by hivemind's own client code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from hivemind.p2p import P2PHandlerError, PeerID
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertUID

from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.protocol.petals.metadata import parse_error
from petals_lightning.protocol.petals.methods import TransformerConnectionHandler
from petals_lightning.protocol.petals.steps import END_OF_SESSION, PetalsStep
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import NUM_BLOCKS
from tools.testing.swarms import PREFIX

SPLIT = 2  # blocks of the first of two servers

ROOM = 1 << 26
PATIENCE = 30.0


def peer_id(server: Any) -> str:
    return server.node.peer_id.to_base58()


def step(hidden: torch.Tensor, start: int = 0, end: int = NUM_BLOCKS, **fields: Any) -> PetalsStep:
    return PetalsStep(PREFIX, start, end, hidden, **fields)


def failure(call: Any) -> tuple[ErrorCode | None, str]:
    """Code and words of the error that a call ends in."""
    with pytest.raises(P2PHandlerError) as refused:
        call()
    assert "Traceback" not in str(refused.value)
    assert ".py" not in str(refused.value)
    return parse_error(str(refused.value))


class PetalsCaller:
    """A peer that calls one server."""

    def __init__(self, node: SwarmNode, server: str):
        self._node = node
        self._stub: Any = TransformerConnectionHandler.get_stub(node.p2p, PeerID.from_base58(server))

    def unary(self, method: str, request: ExpertRequest | ExpertUID) -> Any:
        return self._node.run(getattr(self._stub, method)(request, timeout=PATIENCE))

    def stream(self, method: str, requests: Sequence[ExpertRequest]) -> list[Any]:
        """All responses to requests that are sent at once."""

        async def call() -> list[Any]:
            return [response async for response in await getattr(self._stub, method)(_each(requests))]

        return self._node.run(asyncio.wait_for(call(), PATIENCE))

    def forward(self, request: PetalsForward) -> torch.Tensor:
        response = self.unary("rpc_forward", request.to_parts().to_request())
        return read_response([response], max_bytes=ROOM)[0]

    def backward(self, request: PetalsBackward) -> list[torch.Tensor]:
        response = self.unary("rpc_backward", request.to_parts().to_request())
        return read_response([response], max_bytes=ROOM)

    def open_session(self) -> PetalsConversation:
        return PetalsConversation(self._node, self._stub)


class PetalsConversation:
    """An rpc_inference that goes step by step."""

    def __init__(self, node: SwarmNode, stub: Any):
        self._node = node
        self._requests: asyncio.Queue[ExpertRequest | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[ExpertRequest]:
            while (request := await self._requests.get()) is not None:
                yield request

        async def begin() -> Any:
            return await stub.rpc_inference(requests())

        self._responses = node.run(begin())

    def send(self, step: PetalsStep | ExpertRequest) -> None:
        request = step.to_parts().to_request() if isinstance(step, PetalsStep) else step
        self._node.loop.call_soon_threadsafe(self._requests.put_nowait, request)

    def receive(self) -> torch.Tensor:
        response = self._node.run(asyncio.wait_for(anext(self._responses), PATIENCE))
        return read_response([response], max_bytes=ROOM)[0]

    def step(self, step: PetalsStep) -> torch.Tensor:
        self.send(step)
        return self.receive()

    def end(self) -> None:
        """Ends the session; returns when the server has ended the stream."""
        self.send(END_OF_SESSION)
        self._node.loop.call_soon_threadsafe(self._requests.put_nowait, None)

        async def drain() -> list[Any]:
            return [response async for response in self._responses]

        assert self._node.run(asyncio.wait_for(drain(), PATIENCE)) == []


async def _each(requests: Sequence[ExpertRequest]) -> AsyncIterator[ExpertRequest]:
    for request in requests:
        yield request
