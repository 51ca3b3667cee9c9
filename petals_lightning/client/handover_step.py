"""A step of an inference session that its servers hand over to each other.

Every server's output comes home too, but nobody waits for it: it is what the next server got, from which that can be
rebuilt elsewhere.

Shapes: B batch, n new positions, T positions before and with them, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.handover import Handover, Stage
from petals_lightning.client.history import LateInputs
from petals_lightning.client.session_leg import SessionLeg
from petals_lightning.client.verify import check_step
from petals_lightning.client.view import SwarmView
from petals_lightning.protocol.messages import Message
from petals_lightning.protocol.requests import to_wire
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import is_same


def may_hand_over(view: SwarmView, legs: Sequence[SessionLeg], hidden: torch.Tensor, position: int) -> bool:
    """Whether all servers have come as far as `position`, take [B, n, H] at once, and may hand over."""
    if not view.handover.allows([leg.connection for leg in legs]):
        return False
    limits = [leg.connection.info["max_batch_tokens"] for leg in legs if leg.connection is not None]
    if hidden.shape[0] * hidden.shape[1] > min(*limits, view.config.max_microbatch_tokens):
        return False
    return all(
        leg.number is not None and leg.held == position and is_same(leg.reordering, legs[0].reordering) for leg in legs
    )


async def hand_over_step(
    view: SwarmView,
    legs: Sequence[SessionLeg],
    hidden: torch.Tensor,
    position: int,
    *,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    keep: int,
) -> torch.Tensor:
    """Runs new positions through all legs.

    Args:
        legs: as `may_hand_over` wants them; the first one's history has the new positions.
        hidden: [B, n, H]; mask: [B, T]; position_ids: [B, n].
        position: how many stand before these.
        keep: how many of the last outputs are wanted.

    Returns:
        [B, keep, H].

    Raises:
        PeerFailure: a server failed; the legs are as they were before the step, and what their
            servers have beyond that is overwritten by the next one.
    """
    stages: list[Stage] = []
    for leg in legs:
        assert isinstance(leg.connection, PeerConnection)
        assert leg.number is not None
        is_last = leg is legs[-1]
        request = StepRequest(
            session=leg.number,
            start=leg.start,
            end=leg.end,
            hidden=to_wire(hidden, view.wire_dtype(leg.peer)) if not stages else hidden,
            position=position,
            keep=keep if is_last else 0,
            hypo_ids=leg.reordering,
            attention_mask=mask,
            position_ids=position_ids,
            wire_dtype=view.wire_dtype(leg.peer),
        )
        stages.append(Stage(leg.connection, request.to_message()))
    for stage, following in zip(stages, legs[1:], strict=False):
        late = LateInputs(hidden.shape[1])
        following.history.append(late, position_ids)
        stage.answered = _takes_in(late, hidden.shape)
    try:
        reply = await Handover(stages).last()
        check_step(legs[-1].peer, request, reply)
    except BaseException:
        for number, leg in enumerate(legs):
            if number > 0:
                leg.history.crop(position)
            if leg.reordering is not None:
                leg.leave()  # whether the server has reordered its batch is not known
        raise
    for leg in legs:
        leg.held, leg.reordering = position + hidden.shape[1], None
    return reply.tensors["hidden"]


def _takes_in(late: LateInputs, shape: torch.Size) -> Callable[[Message], None]:
    """Takes a server's output as the inputs of the next one; without it they stay missing."""

    def take(reply: Message) -> None:
        out = reply.tensors.get("hidden")
        if out is not None and out.shape == shape:
            late.hidden = out

    return take
