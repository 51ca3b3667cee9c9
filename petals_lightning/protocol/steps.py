"""A step of an inference session: new positions after those whose keys and values the server keeps.

Shapes: see the legend in `petals_lightning.protocol`; n is the number of new positions, T of all positions up to and
including them, L of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol import checks
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.checks import typed
from petals_lightning.protocol.messages import Message, Method
from petals_lightning.protocol.requests import inputs_message


@dataclass
class StepRequest:
    """Run blocks [start, end) on new positions of a session.

    Positions do not count the prefix, which always precedes them, even when a session goes back.

    Attributes:
        session: number of the session on its stream, chosen by the client.
        hidden: [B, n, H].
        position: number of positions before these; the server drops later ones that it holds.
        max_length: opens the session with memory for so many positions, and replaces one of the same number; None
            continues the session.
        keep: how many of the last outputs to return; 0 returns all n.
        prefix: [P, H] if the step opens a session with prompts, else None.
        adapter: of the blocks, for the whole session, or None. Not sent: the receiver fills in what is registered under
            `adapter_key`.
        hypo_ids: [B] int64: sample i continues from sample hypo_ids[i] (beam search); None: the order is unchanged.
        attention_mask: [B, T] bool, or None if there is no padding.
        position_ids: [B, n] int64, or None if they count from `position`.
        want_prefix: whether a step that opens a session returns the prefix's hidden states.
        wire_dtype: of the tensors in the reply; int8_blockwise also of `hidden`.
        adapter_key: names the adapter of the session that the step opens, as in a forward.

    Reply: `hidden` [B, keep or n, H]; `prefix` [P, H] if requested; fields `compute` and `queue` in seconds.
    """

    session: int
    start: int
    end: int
    hidden: torch.Tensor
    position: int
    max_length: int | None = None
    keep: int = 0
    prefix: torch.Tensor | None = None
    adapter: Adapter | None = None
    hypo_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    want_prefix: bool = False
    wire_dtype: str = "float32"
    adapter_key: int | None = None

    _FIELDS = ("session", "start", "end", "position", "max_length", "keep", "want_prefix", "wire_dtype", "adapter_key")
    _TENSORS = ("hidden", "prefix", "hypo_ids", "attention_mask", "position_ids")

    def to_message(self) -> Message:
        return inputs_message(Method.STEP, self)

    @classmethod
    def from_message(cls, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> StepRequest:
        """Reads a step. Raises ProtocolError if a field is missing or has the wrong type, or shapes do not fit."""
        start, end, wire_dtype = checks.span_and_dtype(fields)
        hidden = checks.hidden(tensors, cls._TENSORS)
        batch, tokens, _ = hidden.shape
        prefix, adapter_key = checks.prefix(tensors, hidden), typed(fields, "adapter_key", (int, type(None)))
        position, keep = typed(fields, "position", int), typed(fields, "keep", int)
        max_length = typed(fields, "max_length", (int, type(None)))
        if position < 0 or not 0 <= keep <= tokens:
            raise ProtocolError(f"position {position} and keep {keep} do not fit {tokens} new positions")
        if max_length is not None and (position != 0 or tokens > max_length):
            raise ProtocolError(f"a session of max_length {max_length} cannot open with {position}:{position + tokens}")
        if (prefix is not None or adapter_key is not None) and max_length is None:
            raise ProtocolError("prefix and adapter are given when a session is opened, not later")
        request = cls(
            typed(fields, "session", int), start, end, hidden, position, max_length, keep, prefix, None,
            _shaped(tensors, "hypo_ids", torch.int64, [batch]),
            _shaped(tensors, "attention_mask", torch.bool, [batch, position + tokens]),
            _shaped(tensors, "position_ids", torch.int64, [batch, tokens]),
            typed(fields, "want_prefix", bool), wire_dtype, adapter_key,
        )  # fmt: skip
        if (ids := request.hypo_ids) is not None and (ids.min() < 0 or ids.max() >= batch):
            raise ProtocolError(f"hypo_ids point outside of {batch} samples")
        return request


def _shaped(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, shape: list[int]) -> torch.Tensor | None:
    tensor = tensors.get(name)
    if tensor is not None and (tensor.dtype != dtype or list(tensor.shape) != shape):
        raise ProtocolError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, must be {dtype} {shape}")
    return tensor
