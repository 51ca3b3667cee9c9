"""A session of ours on a server that offers only Petals' methods.

Petals' protocol has no attention mask, so padding is left out. Samples with padding at the same positions form a group,
and each group has its own session on the server, which holds its real positions only.

Shapes: B batch, b samples of a group, n new positions, T positions before and with them, P virtual tokens, H hidden.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from petals_lightning.client.petals.calls import MAX_BATCH_TOKENS, InferenceCall, PetalsCalls
from petals_lightning.client.petals.shapes import active_name, prompts_of, with_prefix
from petals_lightning.errors import PeerFailure, UnsupportedInputError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.steps import PetalsStep
from petals_lightning.protocol.steps import StepRequest

_ROOM_PATIENCE = 1.0
"""Seconds that a server may wait for memory. A session that has just ended has its own stream, so its end may arrive
after the start of the next session."""


@dataclass
class _Group:
    """Samples `rows` [b] of the batch, in a call for them only.

    Attributes:
        held: positions on the server, including the prefix.
        places: [held - P] positions of the session that follow the prefix on the server.
        reordering: [b], not yet sent to the server; None: none.
    """

    rows: torch.Tensor
    call: InferenceCall
    held: int = 0
    places: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    reordering: torch.Tensor | None = None


class PetalsSession:
    """An inference session on a server by Petals' methods.

    Args:
        calls: the server's methods.
        dht_prefix: the model's name.
        request: the step that opens the session.
        sliding_window: reach of the model's attention in positions, padding counted; None: unlimited.
    """

    def __init__(self, calls: PetalsCalls, dht_prefix: str, request: StepRequest, sliding_window: int | None):
        assert request.max_length is not None
        self._calls, self._peer = calls, calls.peer
        self._batch, self._prefix = len(request.hidden), request.prefix
        self._deep = prompts_of(request)
        room = request.max_length + self._prefix_length
        self._first = PetalsStep(
            dht_prefix, request.start, request.end, request.hidden, max_length=room, alloc_timeout=_ROOM_PATIENCE,
            active_adapter=active_name(request),
        )  # fmt: skip
        self._window = sliding_window
        self._groups: list[_Group] = []

    async def step(self, request: StepRequest, on_sent: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
        """Runs a step as our servers do, of any length. Outputs at padding are zeros.

        `on_sent` is called whenever a part of the step is about to be sent.

        Raises:
            PeerFailure: the server failed; or (CACHE_LOST) its positions do not match this step's padding.
            UnsupportedInputError: the padding cannot be left out, or position_ids do not count the real tokens.
        """
        real = self._real_positions(request)
        self._reorder(request.hypo_ids)
        await self._begin(real)
        for group in self._groups:
            places = real[group.rows[0], : request.position].nonzero().flatten()
            if bool((real[group.rows] != real[group.rows[0]]).any()) or not torch.equal(
                group.places[: len(places)], places
            ):
                raise PeerFailure(self._peer, "its session has other padding", ErrorCode.CACHE_LOST.value)
            group.places = places
        outputs = await asyncio.gather(*(self._run(group, real, request, on_sent) for group in self._groups))
        out, prefix_out = torch.zeros_like(request.hidden), None
        for group, (hidden, prefix) in zip(self._groups, outputs, strict=True):
            new = real[group.rows[0], request.position :].nonzero().flatten()
            out[group.rows[:, None], new] = hidden.to(out.dtype)
            prefix_out = prefix_out if prefix_out is not None else prefix
        answer = {"hidden": out[:, -(request.keep or out.shape[1]) :]}
        if request.want_prefix and self._prefix is not None:
            if prefix_out is None:
                raise UnsupportedInputError("every sample of the first step begins with padding: leave it out")
            answer["prefix"] = prefix_out
        return answer

    def close(self) -> None:
        for group in self._groups:
            group.call.close()

    @property
    def _prefix_length(self) -> int:
        return len(self._prefix) if self._prefix is not None else 0

    async def _begin(self, real: torch.Tensor) -> None:
        """Opens calls for samples whose first real position is in this step."""
        begun = {int(row) for group in self._groups for row in group.rows}
        new: dict[tuple[bool, ...], list[int]] = {}
        for row in range(self._batch):
            if row not in begun and bool(real[row].any()):
                new.setdefault(tuple(real[row].tolist()), []).append(row)
        for rows in new.values():
            self._groups.append(_Group(torch.tensor(rows), await self._calls.open_inference(self._first)))

    def _reorder(self, hypo_ids: torch.Tensor | None) -> None:
        if hypo_ids is None:
            return
        for group in self._groups:
            places = {int(row): place for place, row in enumerate(group.rows)}
            sources = [places.get(int(source)) for source in hypo_ids[group.rows]]
            if None in sources:
                reason = "samples would continue others with other padding"
                raise PeerFailure(self._peer, reason, ErrorCode.CACHE_LOST.value)
            order = torch.tensor(sources)
            group.reordering = order if group.reordering is None else group.reordering[order]

    async def _run(
        self, group: _Group, real: torch.Tensor, request: StepRequest, on_sent: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [b, m, H] of the m real new positions, and [P, H] of the prefix when the call is opened."""
        new = real[group.rows[0], request.position :].nonzero().flatten()
        hidden, prompts = request.hidden[group.rows[:, None], new], None
        if not len(new):
            return hidden, None
        length, opens = self._prefix_length, not group.held
        position = length + len(group.places)
        if opens:
            hidden, prompts, position = with_prefix(hidden, self._prefix), self._deep, 0
        elif position < group.held and not self._calls.can_roll_back:
            raise PeerFailure(self._peer, "it cannot go back in a session", ErrorCode.CACHE_LOST.value)
        hypo_ids = group.reordering
        if opens or (hypo_ids is not None and torch.equal(hypo_ids, torch.arange(len(hypo_ids)))):
            hypo_ids = None
        outputs = []
        for piece in hidden.split(max(MAX_BATCH_TOKENS // len(group.rows), length, 1), dim=1):
            on_sent()
            outputs.append(await group.call.step(piece, position, prompts=prompts, hypo_ids=hypo_ids))
            position, prompts, hypo_ids = position + piece.shape[1], None, None
        group.held, group.reordering = position, None
        group.places = torch.cat([group.places, request.position + new])
        out = torch.cat(outputs, dim=1)
        return (out[:, length:], out[0, :length]) if opens and length else (out, None)

    def _real_positions(self, request: StepRequest) -> torch.Tensor:
        """[B, T] bool: true at real positions. Raises UnsupportedInputError if omitting padding changes results."""
        batch, tokens, _ = request.hidden.shape
        if (real := request.attention_mask) is None:
            real = torch.ones(batch, request.position + tokens, dtype=torch.bool)
        count = real.cumsum(1)
        has_gap = bool((~real & (count + self._prefix_length > 0) & (count < count[:, -1:])).any())
        if has_gap and self._window is not None and self._prefix_length + real.shape[1] > self._window:
            raise UnsupportedInputError(
                f"padding between real tokens, or after prompts, counts in this model's sliding window of "
                f"{self._window} positions; servers that offer only Petals' methods take no padding: run samples one "
                "by one, or serve the model with petals-lightning"
            )
        if request.position_ids is None:
            is_counted = not has_gap
        else:
            counted = (count - 1)[:, request.position :]
            is_counted = not bool((real[:, request.position :] & (request.position_ids != counted)).any())
        if not is_counted:
            raise UnsupportedInputError(
                "position_ids must number the real tokens of each sample from 0, where there is padding between or "
                "after prompts: servers that offer only Petals' methods number positions themselves; give "
                "position_ids = attention_mask.cumsum(1) - 1"
            )
        return real
