"""The inputs that a client has sent into a leg of an inference session, kept for replay elsewhere. Pure data.

Shapes: B batch, n positions of one step, T positions so far, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class PendingInputs:
    """Inputs of `length` positions that have not arrived yet: `hidden` [B, length, H] is set when they do."""

    length: int
    hidden: torch.Tensor | None = None


@dataclass
class _Inputs:
    source: PendingInputs
    position_ids: torch.Tensor | None  # [B, n]; None: they continue from the previous positions
    first: int
    length: int

    @property
    def hidden(self) -> torch.Tensor:
        assert self.source.hidden is not None, "inputs that have not come"
        return self.source.hidden[:, : self.length]


class InputHistory:
    """Inputs of positions [0, T). Reorderings of the batch (beam search) are stored, and applied on reading."""

    def __init__(self) -> None:
        self._events: list[_Inputs | torch.Tensor] = []  # a tensor [B] is a reordering of all inputs before it
        self.length = 0

    def append(self, hidden: torch.Tensor | PendingInputs, position_ids: torch.Tensor | None = None) -> None:
        """Adds the inputs [B, n, H] of the next n positions, and position_ids [B, n] if these do not just count up."""
        source = hidden if isinstance(hidden, PendingInputs) else PendingInputs(hidden.shape[1], hidden)
        self._events.append(_Inputs(source, position_ids, self.length, source.length))
        self.length += source.length

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """From now on, sample i continues the past of sample hypo_ids[i]."""
        self._events.append(hypo_ids)

    def crop(self, length: int) -> None:
        """Drops positions from `length` on."""
        if length >= self.length:
            return
        kept: list[_Inputs | torch.Tensor] = []
        for event in self._events:
            if isinstance(event, _Inputs):
                if event.first >= length:
                    continue
                size = length - event.first
                ids = event.position_ids[:, :size] if event.position_ids is not None else None
                event = _Inputs(event.source, ids, event.first, min(size, event.length))
            kept.append(event)
        self._events, self.length = kept, length

    def drop_missing(self) -> None:
        """Drops positions from the first one whose inputs have not arrived."""
        missing = (event for event in self._events if isinstance(event, _Inputs) and event.source.hidden is None)
        if (first := next(missing, None)) is not None:
            self.crop(first.first)

    def read(self, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inputs [B, T - start, H] of positions from `start` on, and position_ids if they do not just count up."""
        order: torch.Tensor | None = None
        pieces: list[_Piece] = []
        for event in reversed(self._events):
            if not isinstance(event, _Inputs):
                order = event if order is None else event[order]
                continue
            if event.first + event.length <= start:
                break
            skip = max(start - event.first, 0)
            hidden, ids = event.hidden[:, skip:], event.position_ids
            ids = ids[:, skip:] if ids is not None else None
            if order is not None:
                hidden, ids = hidden[order], ids[order] if ids is not None else None
            pieces.append(_Piece(hidden, ids, event.first + skip))
        if len(pieces) == 1:
            return pieces[0].hidden, pieces[0].position_ids
        pieces.reverse()
        positions = None
        if any(piece.position_ids is not None for piece in pieces):
            positions = torch.cat([_numbered(piece) for piece in pieces], dim=1)
        return torch.cat([piece.hidden for piece in pieces], dim=1), positions


@dataclass
class _Piece:
    hidden: torch.Tensor
    position_ids: torch.Tensor | None
    first: int


def _numbered(piece: _Piece) -> torch.Tensor:
    if piece.position_ids is not None:
        return piece.position_ids
    batch, count, _ = piece.hidden.shape
    return torch.arange(piece.first, piece.first + count).expand(batch, -1)
