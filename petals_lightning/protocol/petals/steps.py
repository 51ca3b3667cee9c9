"""A step of Petals' `rpc_inference`, and its push to the next server.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of new positions, L of the blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import ExpertRequest

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.calls import Parts, PetalsInputs, checked_hidden, checked_prompts, dummy
from petals_lightning.protocol.petals.metadata import pack_arguments
from petals_lightning.protocol.uids import chain_uid, parse_chain

END_OF_SESSION = ExpertRequest()
"""A request without tensors."""

_MAX_HOPS = 1024
_MAX_ID_CHARACTERS = 256


@dataclass(frozen=True)
class NextServer:
    """A server to push a step's result to: blocks [start, end) in session `session_id` of `peer` (base58)."""

    peer: str
    session_id: str
    start: int
    end: int


@dataclass
class PetalsStep(PetalsInputs):
    """Run the blocks on new positions of the stream's session. A step without positions only asks for memory.

    Attributes:
        prompts: [L, B or 1, P, H] added to the first P of the new positions before each block, or None.
        hypo_ids: [B] int64: sample i continues from sample hypo_ids[i]; None: the order is unchanged.
        session_id: names the session for pushes.
        step_id: identifies copies: a step that arrives twice (from the client, and pushed) runs once.
        start_from_position: drop later positions before this step; None continues at the end.
        max_length: memory for so many positions, in a session's first step; None in later ones.
        alloc_timeout: seconds to wait for memory, in the first step.
        next_servers: servers to push the result to, one after another, if there are no prompts.
        pushed: another server sent it.
        points, active_adapter: as in `PetalsForward`, in the first step.

    Response: hidden [B, n, H].
    """

    prompts: torch.Tensor | None = None
    hypo_ids: torch.Tensor | None = None
    session_id: str | None = None
    step_id: str | None = None
    start_from_position: int | None = None
    max_length: int | None = None
    alloc_timeout: float = 0.0
    next_servers: list[NextServer] = field(default_factory=list)
    pushed: bool = False
    points: float = 0.0
    active_adapter: str | None = None

    def to_parts(self) -> Parts:
        """The step on the wire. Fields that are None are left out."""
        tensors, structure = pack_arguments(
            self.hidden,
            self.prompts if self.prompts is not None else dummy(),
            self.hypo_ids if self.hypo_ids is not None else dummy(torch.int64),
        )
        metadata: dict[str, Any] = {"session_id": self.session_id, "step_id": self.step_id}
        if self.max_length is not None:
            metadata |= {"max_length": self.max_length, "points": self.points, "active_adapter": self.active_adapter}
            if self.alloc_timeout:
                metadata["alloc_timeout"] = self.alloc_timeout
        if self.start_from_position is not None:
            metadata["start_from_position"] = self.start_from_position
        if self.next_servers:
            metadata["next_servers"] = [[hop.peer, hop.session_id, hop.start, hop.end] for hop in self.next_servers]
        if self.pushed:
            metadata["pushed"] = True
        return Parts(chain_uid(self.prefix, self.start, self.end), tensors, metadata, structure)

    @classmethod
    def from_parts(cls, parts: Parts) -> PetalsStep:
        """Reads a step. Raises ProtocolError if a field has the wrong type, or shapes do not fit."""
        if not 1 <= len(parts.tensors) <= 3:
            raise ProtocolError(f"a step takes hidden states, prompts and hypo_ids, got {len(parts.tensors)} tensors")
        prefix, start, end = parse_chain(parts.uid)
        hidden = checked_hidden(parts.tensors[0], "hidden", may_be_empty=True)
        prompts = checked_prompts(parts.tensors[1] if len(parts.tensors) > 1 else None, hidden, end - start)
        hypo_ids = parts.tensors[2] if len(parts.tensors) > 2 and parts.tensors[2].numel() else None
        if hypo_ids is not None and (hypo_ids.dtype != torch.int64 or list(hypo_ids.shape) != [len(hidden)]):
            raise ProtocolError(f"hypo_ids are {hypo_ids.dtype} {list(hypo_ids.shape)}, must be int64 [{len(hidden)}]")
        if hypo_ids is not None and (hypo_ids.min() < 0 or hypo_ids.max() >= len(hidden)):
            raise ProtocolError(f"hypo_ids point outside of {len(hidden)} samples")
        given = parts.metadata
        position, max_length = _given(given, "start_from_position", int), _given(given, "max_length", int)
        if (position is not None and position < 0) or (max_length is not None and max_length < 0):
            raise ProtocolError(f"start_from_position {position} and max_length {max_length} must be 0 or more")
        alloc_timeout = _given(given, "alloc_timeout", (int, float)) or 0.0
        if not 0 <= alloc_timeout < math.inf:
            raise ProtocolError(f"alloc_timeout is {alloc_timeout}, must be a number of seconds")
        return cls(
            prefix, start, end, hidden, prompts, hypo_ids,
            session_id=_identifier(given, "session_id"), step_id=_identifier(given, "step_id"),
            start_from_position=position, max_length=max_length,
            alloc_timeout=alloc_timeout,
            next_servers=_next_servers(given.get("next_servers"), end), pushed=bool(given.get("pushed")),
            points=float(_given(given, "points", (int, float)) or 0.0),
            active_adapter=_given(given, "active_adapter", str) or None,
        )  # fmt: skip


def _given(metadata: dict[str, Any], name: str, kind: Any) -> Any:
    value = metadata.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise ProtocolError(f"{name} is {value!r:.60}")
    try:
        return float(value) if isinstance(value, int) and kind is not int else value
    except OverflowError as e:
        raise ProtocolError(f"{name} is {value!r:.60}") from e


def _identifier(metadata: dict[str, Any], name: str) -> str | None:
    value = _given(metadata, name, str)
    if value is not None and len(value) > _MAX_ID_CHARACTERS:
        raise ProtocolError(f"{name} has {len(value)} characters, the limit is {_MAX_ID_CHARACTERS}")
    return value


def _next_servers(value: Any, end: int) -> list[NextServer]:
    """Reads the servers. The blocks of each begin where those before end."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or len(value) > _MAX_HOPS:
        raise ProtocolError(f"next_servers is {value!r:.60}")
    hops = []
    for item in value:
        match item:
            case [str(peer), str(session_id), int(first), int(last)] if end == first < last:
                hops.append(NextServer(peer, session_id, first, last))
                end = last
            case _:
                raise ProtocolError(f"next_servers has {item!r:.100}, must be [peer id, session id, {end}, end]")
    return hops
