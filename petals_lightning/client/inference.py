"""An inference session: keys and values live on servers, and survive the loss of any of them.

The client keeps what entered each leg. When a server is lost, its leg is planned anew and the kept inputs are run
through what takes its place; legs before and behind it notice nothing.

Shapes: B batch, n new positions, T positions before and with them, P virtual tokens, H hidden size, L blocks.
"""

from __future__ import annotations

import itertools
from types import TracebackType
from typing import Self

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.handover import SHOWN_DIRECTLY
from petals_lightning.client.handover_step import hand_over_step, may_hand_over
from petals_lightning.client.session_leg import SessionLeg
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.verify import check_step
from petals_lightning.client.view import SwarmView
from petals_lightning.errors import (
    NoCacheRoomError,
    NoServersError,
    PeerFailure,
    UnsupportedInputError,
    WrongResult,
)
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.requests import to_wire
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.swarm import SwarmNode

_numbers = itertools.count(1)


class InferenceSession:
    """Runs blocks on one position after another; made by `RemoteSequential.inference_session`.

    Args:
        node, view, stats: the client's.
        start, end: the blocks.
        max_length: positions that servers reserve room for, the prefix not counted.
        prefix: [P, H] in front of every sample, or None.
        deep: [L, P, H] added to the prefix before each block, or None.
        rotary_switch: positions, prefix counted, beyond which the model turns all of them by other rotary factors:
            a session that comes there, or back, is run anew from the inputs of its first leg.
    """

    def __init__(
        self,
        node: SwarmNode,
        view: SwarmView,
        stats: TransferStats,
        start: int,
        end: int,
        *,
        max_length: int,
        prefix: torch.Tensor | None = None,
        deep: torch.Tensor | None = None,
        rotary_switch: int | None = None,
    ):
        if max_length < 1:
            raise UnsupportedInputError(f"max_length is {max_length}: a session has room for 1 position or more")
        if deep is not None and (prefix is None or deep.shape != (end - start, *prefix.shape)):
            raise UnsupportedInputError(
                f"deep prompts {tuple(deep.shape)} do not fit {end - start} blocks and the prefix"
            )
        self._node, self._view, self._stats = node, view, stats
        self.start, self.end, self.max_length = start, end, max_length
        self._prefix = prefix.detach().cpu() if prefix is not None else None
        self._deep = deep.detach().cpu() if deep is not None else None
        self._position, self._batch = 0, 0
        self._switch: int | None = None  # the same, prefix not counted
        if rotary_switch is not None:
            self._switch = rotary_switch - (len(prefix) if prefix is not None else 0)
        self._is_beyond = False
        self._legs: list[SessionLeg] = []
        self._full: dict[str, PeerFailure] = {}
        self._closed = False

    @property
    def position(self) -> int:
        """Positions so far, the prefix not counted. Set it to a smaller number to go back there."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self._position:
            raise UnsupportedInputError(
                f"position {value}: a session at {self._position} can go back to 0…{self._position}"
            )
        self._position = value

    @property
    def peers(self) -> list[str]:
        """Peer ids of the servers that the session is on, in the order of blocks."""
        return [leg.peer for leg in self._legs]

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        keep: int = 0,
    ) -> torch.Tensor:
        """Runs the next n positions.

        Args:
            hidden_states: [B, n, H] that enter block `start`; B is the same in all steps.
            attention_mask: [B, T], 0 where a position (new or old) is padding; None: none is.
            position_ids: [B, n] where they do not simply count on.
            keep: how many of the last outputs are wanted, 0 for all.

        Returns:
            [B, n, H], or [B, keep, H].

        Raises:
            UnsupportedInputError: shapes do not fit, or the session would exceed `max_length`.
            NoCacheRoomError: no server of some blocks has room for a session of this batch and length.
            SwarmError: servers failed beyond what retries can mend.
        """
        self._check(hidden_states)
        mask, hidden = None, hidden_states.detach().cpu()
        if attention_mask is not None and not attention_mask.bool().all():
            mask = attention_mask.detach().cpu().bool()
        if position_ids is not None:
            position_ids = position_ids.detach().cpu().expand(len(hidden), -1)
            counted = torch.arange(self._position, self._position + hidden.shape[1])
            position_ids = None if bool((position_ids == counted).all()) else position_ids
        out = self._node.run(self._step(hidden, mask, position_ids, keep))
        return out.to(device=hidden_states.device, dtype=hidden_states.dtype)

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        """From the next step on, sample i has the past of what was sample hypo_ids[i] ([B]; beam search)."""
        hypo_ids = hypo_ids.detach().cpu().long()
        if not torch.equal(hypo_ids, torch.arange(len(hypo_ids))):
            for leg in self._legs:
                leg.reorder(hypo_ids)

    def select(self, samples: torch.Tensor) -> None:
        """From the next step on the batch is these samples ([B'] by number): some may be left out, some repeated.

        Where B' is another size than before, servers are sent the past again.
        """
        if len(samples) == self._batch:
            self.reorder(samples)
        elif self._position:
            for leg in self._legs:
                leg.history.reorder(samples.detach().cpu().long())
            self._batch = len(samples)
            self._node.run(_leave(self._legs))

    def close(self) -> None:
        """Frees the servers' memory. The session cannot be used any more."""
        self._closed = True
        legs, self._legs = self._legs, []
        if any(leg.connection is not None and leg.connection.is_open for leg in legs):
            self._node.run(_leave(legs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, hidden: torch.Tensor) -> None:
        if self._closed:
            raise UnsupportedInputError("this inference session is closed: open another one")
        if hidden.ndim != 3 or not hidden.is_floating_point() or 0 in hidden.shape:
            raise UnsupportedInputError(f"hidden_states must be floating [B, n, H], got {tuple(hidden.shape)}")
        if self._position and len(hidden) != self._batch:
            raise UnsupportedInputError(f"the session has batch {self._batch}, this step has {len(hidden)}")
        if self._position + hidden.shape[1] > self.max_length:
            raise UnsupportedInputError(
                f"{hidden.shape[1]} positions behind {self._position} exceed the session's max_length={self.max_length}"
                ": open it with a larger one, or go back by setting session.position"
            )

    async def _step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        if self._legs and len(hidden) != self._batch:  # back at position 0, with another batch
            await _leave(self._legs)
            self._legs = []
        self._batch = len(hidden)
        if not self._legs:
            self._legs = await self._plan(self.start, self.end)
            self._legs[0].prefix = self._prefix
        for leg in self._legs:
            leg.rewind(self._position)  # a step that failed may have come as far as this leg
        keep = keep or hidden.shape[1]
        self._legs[0].history.append(hidden, position_ids)
        if self._comes_to_switch(position_ids):
            await self._start_anew()
        attempts, lost = Attempts(self._view, self._stats), set[str]()
        if may_hand_over(self._view, self._legs, hidden, self._position):
            try:
                out = await hand_over_step(
                    self._view, self._legs, hidden, self._position, mask=mask, position_ids=position_ids, keep=keep
                )
                self._position += hidden.shape[1]
                self._stats.handovers += 1
                return out
            except PeerFailure as e:
                await self._after_handover(e, attempts)
        for leg in self._legs:
            leg.settle()
        index, out = 0, hidden
        while index < len(self._legs):
            leg, following = self._legs[index], self._legs[index + 1] if index + 1 < len(self._legs) else None
            try:
                out = await self._run(leg, following, mask, keep)
            except PeerFailure as e:
                if e.code == ErrorCode.CACHE_LOST.value and leg.peer not in lost:
                    lost.add(leg.peer)  # once: the same server takes the inputs again
                    attempts.count(e)
                else:
                    self._legs[index : index + 1] = await self._replace(leg, e, attempts)
                continue
            if following is not None:
                following.history.append(out, leg.history.read(following.history.length)[1])
            index += 1
        self._position += hidden.shape[1]
        return out

    def _comes_to_switch(self, position_ids: torch.Tensor | None) -> bool:
        """Whether keys of the positions before a step, which is in the history, must be made anew."""
        if self._switch is None:
            return False
        end = self._legs[0].history.length if position_ids is None else int(position_ids.max()) + 1
        before, self._is_beyond = self._is_beyond, end > self._switch
        return self._is_beyond != before

    async def _start_anew(self) -> None:
        """The next run takes all positions from the inputs of the first leg."""
        await _leave(self._legs)
        for leg in self._legs[1:]:
            leg.history.crop(0)

    async def _after_handover(self, failure: PeerFailure, attempts: Attempts) -> None:
        """Whatever failed: the step is run again directly, by others where a server is lost."""
        # What one server says may be the fault of the one before it: sent directly, that shows.
        if isinstance(failure, WrongResult) or failure.code in SHOWN_DIRECTLY:
            self._view.handover.avoid(self.peers, failure)
            return
        index = next(number for number, leg in enumerate(self._legs) if leg.peer == failure.peer)
        if failure.code == ErrorCode.CACHE_LOST.value:
            self._legs[index].leave()
            attempts.count(failure)
        else:
            self._legs[index : index + 1] = await self._replace(self._legs[index], failure, attempts)

    async def _plan(self, start: int, end: int) -> list[SessionLeg]:
        try:
            route = await self._view.route(start, end, tokens=1, avoid=self._full)
        except NoServersError as e:
            if not self._full:
                raise
            words = "; ".join(str(failure) for failure in self._full.values())
            raise NoCacheRoomError(
                f"no server has room for this inference session ({words}). Take a smaller max_length or batch, wait "
                "until others have closed theirs, or serve with a larger --cache-memory"
            ) from e
        return [SessionLeg(planned.start, planned.end, planned.peer_id) for planned in route]

    async def _replace(self, leg: SessionLeg, failure: PeerFailure, attempts: Attempts) -> list[SessionLeg]:
        """Legs that take the place of one whose server failed."""
        if failure.code == ErrorCode.OVERLOADED.value:
            self._full[leg.peer] = failure  # it is well, and may go on serving others
            attempts.count(failure)
        else:
            attempts.failed(failure, leg.start, leg.end)
        legs = await self._plan(leg.start, leg.end)
        legs[0].history, legs[0].prefix = leg.history, leg.prefix
        return legs

    async def _run(
        self, leg: SessionLeg, following: SessionLeg | None, mask: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """Brings a leg's server up to date; returns the last `keep` outputs, or all that the following leg lacks."""
        try:
            if leg.connection is None or not leg.connection.is_open:
                leg.number, leg.held, leg.reordering = None, 0, None  # sessions end with their stream
                leg.connection = await self._view.connection(leg.peer)
            wanted = leg.history.length - keep
            if following is not None:
                wanted = following.history.length
                leg.held = min(leg.held, wanted)
            outputs = []
            while leg.held < leg.history.length:
                out, first = await self._send(leg, following, mask, wanted)
                outputs.append(out[:, max(wanted - first, 0) :])
        except BaseException:
            leg.leave()  # how far the server came is not known
            raise
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def _send(
        self, leg: SessionLeg, following: SessionLeg | None, mask: torch.Tensor | None, wanted: int
    ) -> tuple[torch.Tensor, int]:
        """Sends as much of what the server lacks as it takes at once.

        Returns:
            Outputs of the positions that are at or behind `wanted` (one at least), and the first one's position.
        """
        connection = leg.connection
        assert connection is not None
        hidden, position_ids = leg.history.read(leg.held)
        opens = leg.number is None
        prefix = leg.prefix if opens else None
        tokens = min(connection.info["max_batch_tokens"], self._view.config.max_microbatch_tokens)
        at_once = max(tokens // len(hidden) - (len(prefix) if prefix is not None else 0), 1)
        if self._is_beyond and self._switch is not None and leg.held == 0:
            at_once = max(at_once, self._switch + 1) if position_ids is None else hidden.shape[1]  # a piece by itself
        if connection.cuts_steps:
            at_once = hidden.shape[1]
            if self._is_beyond and mask is not None and bool((mask.sum(1) <= (self._switch or 0)).any()):
                raise UnsupportedInputError(
                    f"beyond {self._switch} positions this model turns all samples of a batch by other rotary factors, "
                    "also those that are shorter without padding; servers that offer only Petals' methods take no "
                    "padding: run samples one by one, or serve the model with petals-lightning"
                )
        hidden = hidden[:, :at_once]
        end = leg.held + hidden.shape[1]
        kept = min(max(end - wanted, 1), hidden.shape[1])
        wire = self._view.wire_dtype(leg.peer)
        deep = self._deep[leg.start - self.start : leg.end - self.start] if self._deep is not None and opens else None
        request = StepRequest(
            session=next(_numbers) if leg.number is None else leg.number,
            start=leg.start,
            end=leg.end,
            hidden=to_wire(hidden, wire),
            position=leg.held,
            max_length=self.max_length if opens else None,
            keep=kept,
            prefix=to_wire(prefix, wire, prompts=True) if prefix is not None else None,
            deep=to_wire(deep, wire, prompts=True) if deep is not None else None,
            hypo_ids=leg.reordering if not opens else None,
            attention_mask=mask[:, :end] if mask is not None else None,
            position_ids=position_ids[:, :at_once] if position_ids is not None else None,
            want_prefix=prefix is not None and following is not None,
            wire_dtype=wire,
        )
        leg.number = request.session
        reply = await connection.call(request.to_message())
        check_step(leg.peer, request, reply)
        if request.want_prefix:
            assert following is not None
            following.prefix = reply.tensors["prefix"]
        leg.held, leg.reordering = end, None
        return reply.tensors["hidden"], end - kept


async def _leave(legs: list[SessionLeg]) -> None:
    for leg in legs:
        leg.leave()
