"""An inference session: keys and values are kept on servers, and survive the loss of any of them.

The client keeps the inputs of each leg. When a server is lost, its leg is planned again and the kept inputs are run
through the servers that replace it. The other legs are not affected.

Shapes: B batch, n new positions, T positions before and with them, P virtual tokens, H hidden size, L blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from petals_lightning.client.attempts import Attempts
from petals_lightning.client.exchange import Exchange, Stage
from petals_lightning.client.handover import may_be_anothers_fault
from petals_lightning.client.input_history import PendingInputs
from petals_lightning.client.router import Router
from petals_lightning.client.servers import ServerPool
from petals_lightning.client.session_leg import SessionLeg
from petals_lightning.client.stats import TransferStats
from petals_lightning.client.validation import check_step
from petals_lightning.errors import (
    CacheFullError,
    NoServersError,
    PeerFailure,
    UnsupportedInputError,
)
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode, Message
from petals_lightning.protocol.requests import to_wire
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.protocol.tensors import is_same
from petals_lightning.swarm import SwarmNode

_LOST = {ErrorCode.CACHE_LOST.value, ErrorCode.ADAPTER_LOST.value}
_numbers = itertools.count(1)


class InferenceSession:
    """Runs blocks on one position after another; made by `RemoteSequential.inference_session`.

    Args:
        node, servers, router, stats: of the client.
        start, end: the blocks.
        max_length: positions for which servers reserve memory, without the prefix.
        prefix: [P, H] before every sample, or None.
        adapter: of the blocks, or None.
        rotary_switch: positions, with the prefix, beyond which the model uses other rotary factors for all positions. A
            session that crosses this limit, in either direction, runs again from the inputs of its first leg.
    """

    def __init__(
        self,
        node: SwarmNode,
        servers: ServerPool,
        router: Router,
        stats: TransferStats,
        start: int,
        end: int,
        *,
        max_length: int,
        prefix: torch.Tensor | None = None,
        adapter: Adapter | None = None,
        rotary_switch: int | None = None,
    ):
        if max_length < 1:
            raise UnsupportedInputError(f"max_length is {max_length}: a session has room for 1 position or more")
        self._node, self._servers, self._router, self._stats = node, servers, router, stats
        self.start, self.end, self.max_length = start, end, max_length
        self._prefix = prefix.detach().cpu() if prefix is not None else None
        self._adapter = adapter
        self._position, self._batch = 0, 0
        self._switch: int | None = None  # the same limit without the prefix
        if rotary_switch is not None:
            past = adapter.past_length if adapter is not None else 0
            self._switch = rotary_switch - (len(prefix) if prefix is not None else past)
        self._uses_long_factors = False
        self._legs: list[SessionLeg] = []
        self._full: dict[str, PeerFailure] = {}
        self._closed = False

    @property
    def position(self) -> int:
        """Positions so far, without the prefix. Set it to a smaller number to go back."""
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
        """Peer ids of the servers that run the session, in the order of blocks."""
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
            hidden_states: [B, n, H] that enter block `start`. B is the same in all steps.
            attention_mask: [B, T], 0 where an old or new position is padding; None: no padding.
            position_ids: [B, n] if they do not just count up.
            keep: number of last outputs to return, 0 for all.

        Returns:
            [B, n, H], or [B, keep, H].

        Raises:
            UnsupportedInputError: shapes do not match, or the session would exceed `max_length`.
            CacheFullError: for some blocks, no server has room for this batch and length.
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
        """From the next step on, sample i continues the past of sample hypo_ids[i] ([B]; beam search)."""
        hypo_ids = hypo_ids.detach().cpu().long()
        if not torch.equal(hypo_ids, torch.arange(len(hypo_ids))):
            for leg in self._legs:
                leg.reorder(hypo_ids)

    def select(self, samples: torch.Tensor) -> None:
        """From the next step on, the batch is these samples ([B'], by number; some may be dropped or repeated).

        If B' differs from B, servers are sent the past again.
        """
        if len(samples) == self._batch:
            self.reorder(samples)
        elif self._position:
            for leg in self._legs:
                leg.history.reorder(samples.detach().cpu().long())
            self._batch = len(samples)
            self._node.run(_leave(self._legs))

    def close(self) -> None:
        """Frees the servers' memory. The session cannot be used afterwards."""
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
                f"{hidden.shape[1]} positions after {self._position} exceed the session's max_length={self.max_length}"
                ": open it with a larger one, or go back by setting session.position"
            )

    async def _step(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        if self._legs and len(hidden) != self._batch:  # at position 0 again, with another batch
            await _leave(self._legs)
            self._legs = []
        self._batch = len(hidden)
        if not self._legs:
            self._legs = await self._plan(self.start, self.end)
            self._legs[0].prefix = self._prefix
        for leg in self._legs:
            leg.rewind(self._position)  # a failed step may have reached this leg
        keep = keep or hidden.shape[1]
        self._legs[0].history.append(hidden, position_ids)
        if self._crosses_rotary_limit(position_ids):
            await self._replay()
        attempts = Attempts(self._servers, self._router, self._stats)
        sizes, index, out = self._segments(hidden), 0, hidden
        while index < len(self._legs):
            size = sizes.pop(0) if sizes else 1
            legs, following = self._legs[index : index + size], next(iter(self._legs[index + size :]), None)
            try:
                out = await self._run(legs, following, mask, keep)
            except PeerFailure as e:
                await self._recover(legs, index, e, attempts)
                sizes.clear()  # from here on, server by server
                for leg in self._legs:
                    leg.settle()
                continue
            if following is not None:
                following.history.append(out, legs[0].history.read(following.history.length)[1])
            self._stats.handovers += size > 1
            index += size
        self._position += hidden.shape[1]
        return out

    def _segments(self, hidden: torch.Tensor) -> list[int]:
        """The number of consecutive legs that run [B, n, H] as one request, for each segment.

        Servers hand a step over to each other if they all hold the positions before it.
        """
        room = hidden.shape[0] * hidden.shape[1] <= min(self._max_tokens(leg) for leg in self._legs)
        if room and all(self._is_ready(leg) for leg in self._legs):
            sizes = self._router.handover.group([leg.connection for leg in self._legs])
        else:
            sizes = [1] * len(self._legs)
        index = 0
        for size in sizes:  # a segment's input must be known here; inputs inside of it may still be in flight
            self._legs[index].settle()
            if self._legs[index].history.length < self._position:
                sizes = [1] * len(self._legs)
                break
            index += size
        if max(sizes) == 1:
            for leg in self._legs:
                leg.settle()
        return sizes

    def _is_ready(self, leg: SessionLeg) -> bool:
        is_same_order = is_same(leg.reordering, self._legs[0].reordering)
        return leg.number is not None and leg.held == self._position and is_same_order

    def _max_tokens(self, leg: SessionLeg) -> int:
        """The largest B·n that a leg's server takes in one request."""
        limit = leg.connection.info["max_batch_tokens"] if leg.connection is not None else 0
        return min(limit, self._servers.config.max_microbatch_tokens)

    def _crosses_rotary_limit(self, position_ids: torch.Tensor | None) -> bool:
        """Whether the keys of positions before the newest step in the history must be computed again."""
        if self._switch is None:
            return False
        end = self._legs[0].history.length if position_ids is None else int(position_ids.max()) + 1
        before, self._uses_long_factors = self._uses_long_factors, end > self._switch
        return self._uses_long_factors != before

    async def _replay(self) -> None:
        """Makes the next run replay all positions from the inputs of the first leg."""
        await _leave(self._legs)
        for leg in self._legs[1:]:
            leg.history.crop(0)

    async def _recover(self, legs: list[SessionLeg], index: int, failure: PeerFailure, attempts: Attempts) -> None:
        """Prepares the segment at `index` to run again, on other servers where one is lost."""
        if len(legs) > 1 and may_be_anothers_fault(failure):
            self._router.handover.avoid([leg.peer for leg in legs], failure)
            return
        number, leg = next((n, leg) for n, leg in enumerate(legs, index) if leg.peer == failure.peer)
        if failure.code in _LOST and (leg.peer, failure.code) not in attempts.lost:
            attempts.lost.add((leg.peer, failure.code))  # once, the same server is sent again what it has lost
            if failure.code == ErrorCode.ADAPTER_LOST.value and leg.connection is not None:
                leg.connection.forget_adapters()
            leg.leave()
            attempts.count(failure)
        else:
            self._legs[number : number + 1] = await self._replace(leg, failure, attempts)

    async def _plan(self, start: int, end: int) -> list[SessionLeg]:
        try:
            route = await self._router.route(start, end, tokens=1, avoid=self._full)
        except NoServersError as e:
            if not self._full:
                raise
            reasons = "; ".join(str(failure) for failure in self._full.values())
            raise CacheFullError(
                f"no server has room for this inference session ({reasons}). Take a smaller max_length or batch, wait "
                "until others have closed theirs, or serve with a larger --cache-memory"
            ) from e
        return [SessionLeg(planned.start, planned.end, planned.peer_id) for planned in route]

    async def _replace(self, leg: SessionLeg, failure: PeerFailure, attempts: Attempts) -> list[SessionLeg]:
        """The legs that replace one whose server failed."""
        if failure.code == ErrorCode.OVERLOADED.value:
            self._full[leg.peer] = failure  # the server is healthy, and may still serve others
            attempts.count(failure)
        else:
            attempts.failed(failure, leg.start, leg.end)
        legs = await self._plan(leg.start, leg.end)
        legs[0].history, legs[0].prefix = leg.history, leg.prefix
        return legs

    async def _run(
        self, legs: list[SessionLeg], following: SessionLeg | None, mask: torch.Tensor | None, keep: int
    ) -> torch.Tensor:
        """Brings a segment's servers up to date. Returns the last `keep` outputs, or all that the next leg lacks.

        Raises:
            PeerFailure: the next step overwrites what servers hold beyond the inputs kept here.
        """
        first = legs[0]
        try:
            if len(legs) == 1 and (first.connection is None or not first.connection.is_open):
                first.number, first.held, first.reordering = None, 0, None  # sessions end with their stream
                first.connection = await self._servers.connection(first.peer)
            first_needed = first.history.length - keep
            if following is not None:
                first_needed = following.history.length
                first.held = min(first.held, first_needed)
            outputs = []
            while first.held < first.history.length:
                out, position = await self._send(legs, following, mask, first_needed)
                outputs.append(out[:, max(first_needed - position, 0) :])
        except BaseException:
            for leg in legs[1:]:
                leg.history.crop(leg.held)
            for leg in legs:
                if len(legs) == 1 or leg.reordering is not None:
                    leg.leave()  # how far its server has got is unknown
            raise
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def _send(
        self, legs: list[SessionLeg], following: SessionLeg | None, mask: torch.Tensor | None, first_needed: int
    ) -> tuple[torch.Tensor, int]:
        """Sends as many of the missing positions as the servers take in one request.

        Returns:
            Outputs of the positions from `first_needed` on (at least one), and the first one's position.
        """
        first, last = legs[0], legs[-1]
        hidden, position_ids = first.history.read(first.held)
        opens = first.number is None
        at_once = self._at_once(first, hidden, position_ids, mask)
        hidden = hidden[:, :at_once]
        start, end = first.held, first.held + hidden.shape[1]
        kept = min(max(end - first_needed, 1), hidden.shape[1])
        entering = self._servers.wire_dtype(first.peer)
        prefix = to_wire(first.prefix, entering, shared=True) if opens and first.prefix is not None else None
        adapter = self._adapter.between(first.start, first.end) if opens and self._adapter is not None else None
        key = None
        if adapter is not None and not adapter.is_empty:
            assert first.connection is not None
            key = await first.connection.register_adapter(adapter, entering)
        position_ids = position_ids[:, :at_once] if position_ids is not None else None
        requests = []
        for leg in legs:
            leg.number = next(_numbers) if leg.number is None else leg.number
            request = StepRequest(
                session=leg.number,
                start=leg.start,
                end=leg.end,
                hidden=to_wire(hidden, entering) if leg is first else hidden,
                position=start,
                max_length=self.max_length if opens else None,
                keep=kept if leg is last else 0,
                prefix=prefix,
                adapter=adapter,
                adapter_key=key,
                hypo_ids=leg.reordering if not opens else None,
                attention_mask=mask[:, :end] if mask is not None else None,
                position_ids=position_ids,
                want_prefix=prefix is not None and following is not None,
                wire_dtype=self._servers.wire_dtype(leg.peer),
            )
            requests.append(request)
        stages = []
        for leg, request in zip(legs, requests, strict=True):
            assert leg.connection is not None
            stages.append(Stage(leg.connection, request.to_message()))
        for stage, inner in zip(stages, legs[1:], strict=False):
            late = PendingInputs(hidden.shape[1])
            inner.history.append(late, position_ids)
            stage.answered = _store_inputs(late, hidden.shape)
        reply = await Exchange(stages).last()
        check_step(last.peer, requests[-1], reply)
        if requests[-1].want_prefix:
            assert following is not None
            following.prefix = reply.tensors["prefix"]
        for leg in legs:
            leg.held, leg.reordering = end, None
        return reply.tensors["hidden"], end - kept

    def _at_once(
        self, leg: SessionLeg, hidden: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
    ) -> int:
        """The number of missing positions [B, n, H] that a leg's server is sent in one request."""
        assert leg.connection is not None
        prefix = len(leg.prefix) if leg.number is None and leg.prefix is not None else 0
        at_once = max(self._max_tokens(leg) // len(hidden) - prefix, 1)
        if self._uses_long_factors and self._switch is not None and leg.held == 0:
            at_once = max(at_once, self._switch + 1) if position_ids is None else hidden.shape[1]  # a separate request
        if leg.connection.cuts_steps:
            at_once = hidden.shape[1]
            if self._uses_long_factors and mask is not None and bool((mask.sum(1) <= (self._switch or 0)).any()):
                raise UnsupportedInputError(
                    f"beyond {self._switch} positions this model uses other rotary factors for all samples of a batch, "
                    "also those that are shorter without padding; servers that offer only Petals' methods take no "
                    "padding: run samples one by one, or serve the model with petals-lightning"
                )
        return at_once


def _store_inputs(late: PendingInputs, shape: torch.Size) -> Callable[[Message], None]:
    """Stores a server's output, which is also sent to the client, as the inputs of the next server."""

    def take(reply: Message) -> None:
        out = reply.tensors.get("hidden")
        if out is not None and out.shape == shape:
            late.hidden = out

    return take


async def _leave(legs: list[SessionLeg]) -> None:
    for leg in legs:
        leg.leave()
