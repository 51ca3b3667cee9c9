"""A session of ours on a server that offers only Petals' methods.

There is no attention mask in Petals' protocol. Samples that are padded on the left are therefore run without their
padding: those with the same amount of it form a group, and every group is a session of its own on the server.

Shapes: B batch, n new positions, T positions before and with them, P virtual tokens, H hidden size.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch

from petals_lightning.client.petals_calls import InferenceCall, PetalsCalls
from petals_lightning.client.petals_shapes import with_prefix
from petals_lightning.errors import PeerFailure, UnsupportedInputError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.steps import PetalsStep
from petals_lightning.protocol.steps import StepRequest


@dataclass
class _Group:
    """Samples `rows` [b] of the batch, each without its first `padding` positions, in a call of their own."""

    rows: torch.Tensor
    padding: int
    call: InferenceCall
    held: int = 0  # positions on the server, the prefix among them
    reordering: torch.Tensor | None = None  # of which the server has not been told


class PetalsSession:
    """Args:
    calls: the server's methods.
    dht_prefix: the model's name.
    request: the step that opens the session.
    """

    def __init__(self, calls: PetalsCalls, dht_prefix: str, request: StepRequest):
        assert request.max_length is not None
        self._calls, self._peer = calls, calls.peer
        self._batch, self._prefix = len(request.hidden), request.prefix
        self._deep = request.deep[:, None] if request.deep is not None else None
        room = request.max_length + self._prefix_length
        self._first = PetalsStep(dht_prefix, request.start, request.end, request.hidden, max_length=room)
        self._groups: list[_Group] = []

    async def step(self, request: StepRequest) -> dict[str, torch.Tensor]:
        """As our servers' step; outputs of padding are zeros.

        Raises:
            PeerFailure: the server failed; or (CACHE_LOST) what it holds does not fit this step's padding.
            UnsupportedInputError: padding inside of a sample, or positions that do not count on.
        """
        padding = _left_padding(request)
        self._reorder(request.hypo_ids)
        await self._begin(padding, request.position + request.hidden.shape[1])
        for group in self._groups:
            if bool((padding[group.rows] != group.padding).any()):
                raise PeerFailure(self._peer, "its session has other padding", ErrorCode.CACHE_LOST.value)
        outputs = await asyncio.gather(*(self._run(group, request) for group in self._groups))
        out, prefix_out = torch.zeros_like(request.hidden), None
        for group, (hidden, prefix) in zip(self._groups, outputs, strict=True):
            if hidden.shape[1]:
                out[group.rows, out.shape[1] - hidden.shape[1] :] = hidden.to(out.dtype)
            prefix_out = prefix_out if prefix_out is not None else prefix
        found = {"hidden": out[:, -(request.keep or out.shape[1]) :]}
        if request.want_prefix and self._prefix is not None:
            if prefix_out is None:
                raise UnsupportedInputError("every sample of the first step begins with padding: leave it out")
            found["prefix"] = prefix_out
        return found

    def close(self) -> None:
        for group in self._groups:
            group.call.close()

    @property
    def _prefix_length(self) -> int:
        return len(self._prefix) if self._prefix is not None else 0

    async def _begin(self, padding: torch.Tensor, end: int) -> None:
        """Opens calls for samples that have their first real position before `end`."""
        begun = {int(row) for group in self._groups for row in group.rows}
        new = [row for row in range(self._batch) if row not in begun and padding[row] < end]
        for amount in sorted({int(padding[row]) for row in new}):
            rows = torch.tensor([row for row in new if padding[row] == amount])
            self._groups.append(_Group(rows, amount, await self._calls.open_inference(self._first)))

    def _reorder(self, hypo_ids: torch.Tensor | None) -> None:
        if hypo_ids is None:
            return
        for group in self._groups:
            places = {int(row): place for place, row in enumerate(group.rows)}
            sources = [places.get(int(source)) for source in hypo_ids[group.rows]]
            if None in sources:
                words = "samples would go on from others with other padding"
                raise PeerFailure(self._peer, words, ErrorCode.CACHE_LOST.value)
            order = torch.tensor(sources)
            group.reordering = order if group.reordering is None else group.reordering[order]

    async def _run(self, group: _Group, request: StepRequest) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs [b, m, H] of the last m positions, those that are real, and the prefix's [P, H] on opening."""
        hidden = request.hidden[group.rows, max(group.padding - request.position, 0) :]
        position, length, prompts = max(request.position - group.padding, 0), self._prefix_length, None
        if not hidden.shape[1]:
            return hidden, None
        opens, position = not group.held, position + length
        if opens:
            hidden, prompts, position = with_prefix(hidden, self._prefix), self._deep, 0
        elif position < group.held and not self._calls.can_roll_back:
            raise PeerFailure(self._peer, "it cannot go back in a session", ErrorCode.CACHE_LOST.value)
        hypo_ids = group.reordering
        if hypo_ids is not None and torch.equal(hypo_ids, torch.arange(len(hypo_ids))):
            hypo_ids = None
        out = await group.call.step(hidden, position, prompts=prompts, hypo_ids=None if opens else hypo_ids)
        group.held, group.reordering = position + hidden.shape[1], None
        if not opens or not length:
            return out, None
        return out[:, length:], out[0, :length]


def _left_padding(request: StepRequest) -> torch.Tensor:
    """[B]: with how many positions of padding each sample begins, as far as this step goes."""
    batch, tokens, _ = request.hidden.shape
    mask = request.attention_mask
    padding = (~mask).sum(1) if mask is not None else torch.zeros(batch, dtype=torch.long)
    if mask is not None and not torch.equal(mask, torch.arange(mask.shape[1])[None] >= padding[:, None]):
        raise UnsupportedInputError(
            "attention_mask has padding inside of a sample or on the right: servers that offer only Petals' methods "
            "take padding on the left only; leave it out, or run samples one by one"
        )
    if request.position_ids is not None:
        counted = torch.arange(request.position, request.position + tokens)[None] - padding[:, None]
        if bool(((request.position_ids != counted) & (counted >= 0)).any()):
            raise UnsupportedInputError(
                "position_ids do not count on from the first real token: servers that offer only Petals' methods "
                "number positions themselves; leave position_ids off"
            )
    return padding
