"""Handover: a server sends its output directly to the next server, along a route that the client chose.

A request may carry a `route`: a list of hops, one for each later server. A server runs its own blocks, answers the
client without the tensors that go on, and sends the next server a `handover`: the request that the client would have
sent, with the rest of the route. There it counts as a request on the client's own stream, and is answered on it.

Each hop carries a permit, which proves to the next server that the client wants this. It is made with a key that only
the client and the next server know, for one call by one peer, and can be used once.
"""

from __future__ import annotations

import heapq
import hmac
import secrets
from dataclasses import dataclass, replace
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import WIRE_DTYPES, typed
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.requests import to_wire
from petals_lightning.protocol.tensors import INT8_BLOCKWISE

STREAM_KEY_BYTES = 32
MAX_HOPS = 256
_MAX_USED = 4096  # call ids that are stored per stream
_METHODS = {Method.FORWARD, Method.BACKWARD, Method.STEP}
# Tensors that later servers need besides outputs: `rows` is for the last server, the others for all.
_CARRIED = {"rows", "hypo_ids", "attention_mask", "position_ids"}


def new_stream_key() -> bytes:
    """A secret for one client's stream; the client makes permits with it."""
    return secrets.token_bytes(STREAM_KEY_BYTES)


def make_permit(stream_key: bytes, bearer: str, call: int) -> bytes:
    """Permits the peer `bearer` to hand over the request with id `call` to the server that made the key."""
    return hmac.digest(
        stream_key, b"petals_lightning.handover.v1" + call.to_bytes(8, "big") + bearer.encode(), "sha256"
    )


@dataclass(frozen=True)
class Hop:
    """One server of a route.

    Attributes:
        peer: its base58 id.
        stream: the number of the client's stream there.
        call: id of the request; the server answers the client under it.
        permit: for the server before it.
        fields: of its request.
    """

    peer: str
    stream: int
    call: int
    permit: bytes
    fields: dict[str, Any]

    def to_value(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_value(cls, value: Any) -> Hop:
        """Reads a hop. Raises ProtocolError if a part is missing or has the wrong type."""
        if not isinstance(value, dict):
            raise ProtocolError(f"a hop of a route is {value!r:.60}")
        hop = cls(
            typed(value, "peer", str), typed(value, "stream", int), typed(value, "call", int),
            typed(value, "permit", bytes), typed(value, "fields", dict),
        )  # fmt: skip
        if not 0 < hop.call < 1 << 64:
            raise ProtocolError(f"a hop's call id is {hop.call}")
        if hop.fields.get("wire_dtype") not in WIRE_DTYPES:
            raise ProtocolError(f"wire_dtype {hop.fields.get('wire_dtype')!r:.40} is not one of {sorted(WIRE_DTYPES)}")
        return hop


def read_route(fields: dict[str, Any]) -> list[Hop]:
    """The hops after the server that got a request; empty if it is the last one.

    Raises:
        ProtocolError: the route is malformed.
    """
    route = fields.get("route", [])
    if not isinstance(route, list) or len(route) > MAX_HOPS:
        raise ProtocolError(f"a route is a list of up to {MAX_HOPS} hops, got {route!r:.60}")
    return [Hop.from_value(value) for value in route]


def carried_tensors(request: Message) -> dict[str, torch.Tensor]:
    """The tensors of a request that later servers need too."""
    return {name: tensor for name, tensor in request.tensors.items() if name in _CARRIED}


def split_reply(
    method: Method, reply: Message, carried: dict[str, torch.Tensor], route: list[Hop]
) -> tuple[Message, Message]:
    """Splits an answer into the handover for the next server and the answer for the client.

    Args:
        method: of the request.
        reply: the answer that the client would get without a route.
        carried: from `carried_tensors`.
        route: at least one hop.

    Raises:
        ProtocolError: the request did not ask for what the next server needs.
    """
    hop, rest = route[0], route[1:]
    home = dict(reply.tensors)
    if "hidden" not in home:
        raise ProtocolError("a route needs input_grad on every server but the first one")
    if method is Method.STEP:  # the client needs the output too, to rebuild a session after a server is lost
        onward = {"hidden": home["hidden"]}
    else:
        names = ("grad", "grad_prefix") if method is Method.BACKWARD else ("hidden", "prefix")
        onward = {new: home.pop(old) for new, old in zip(names, ("hidden", "prefix"), strict=True) if old in home}
    wire_dtype = hop.fields["wire_dtype"]
    onward = {name: to_wire(tensor, wire_dtype, shared=name == "prefix") for name, tensor in onward.items()}
    fields = {
        "stream": hop.stream,
        "call": hop.call,
        "permit": hop.permit,
        "method": method.value,
        "fields": hop.fields | {"route": [following.to_value() for following in rest]},
    }
    to_next = Message(Method.HANDOVER, fields, onward | carried, int8_blockwise=wire_dtype == INT8_BLOCKWISE)
    return to_next, replace(reply, tensors=home)


@dataclass(frozen=True)
class Envelope:
    """The fields of a `handover`: the request, the client's stream on the receiving server, and the call id."""

    stream: int
    call: int
    permit: bytes
    method: Method
    fields: dict[str, Any]

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Envelope:
        """Reads the fields. Raises ProtocolError if one is missing or has the wrong type, or for another method."""
        method = typed(fields, "method", str)
        if method not in _METHODS:
            raise ProtocolError(f"{method!r:.40} cannot be handed over")
        envelope = cls(
            typed(fields, "stream", int), typed(fields, "call", int), typed(fields, "permit", bytes), Method(method),
            typed(fields, "fields", dict),
        )  # fmt: skip
        if not 0 < envelope.call < 1 << 64:
            raise ProtocolError(f"a call id is {envelope.call}")
        return envelope

    def is_permitted(self, stream_key: bytes, bearer: str) -> bool:
        """Whether the client that knows the key permits the peer `bearer` to hand this over."""
        return hmac.compare_digest(self.permit, make_permit(stream_key, bearer, self.call))

    def open(self, message: Message) -> Message:
        """The request inside the handover `message`."""
        return replace(message, method=self.method, fields=self.fields)


class UsedCalls:
    """Call ids of one stream that can no longer be handed over.

    A peer that could use its permit again would replace the graph that the client's backward needs by one of other
    activations. A client's ids increase. So if too many are stored, the lowest is dropped, and all up to it count as
    used.
    """

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._lowest: list[int] = []  # a heap of the same ids
        self._floor = 0

    def add(self, call: int) -> bool:
        """Marks an id as used. Returns whether it was unused."""
        if call <= self._floor or call in self._ids:
            return False
        self._ids.add(call)
        heapq.heappush(self._lowest, call)
        if len(self._ids) > _MAX_USED:
            self._floor = heapq.heappop(self._lowest)
            self._ids.remove(self._floor)
        return True
