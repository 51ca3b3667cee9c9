"""One request through several servers that hand it over to each other: its stages, its answers, and when to do so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from petals_lightning.client.config import ClientConfig
from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.deadlines import ServiceClock
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.protocol.handover import STREAM_KEY_BYTES, Hop, make_permit
from petals_lightning.protocol.messages import ErrorCode, Message

logger = logging.getLogger(__name__)

SHOWN_DIRECTLY = {
    code.value
    for code in (
        ErrorCode.NOT_HANDED_OVER,
        ErrorCode.GRAPH_LOST,
        ErrorCode.PROMPTS_LOST,
        ErrorCode.BAD_REQUEST,
        ErrorCode.INTERNAL,
    )
}
"""Of these it is not known whose fault they are: of the server, of one before it, or of handing over."""

_AVOID_PERIOD, _MAX_AVOID_PERIOD = 30.0, 600.0


@dataclass
class Stage:
    """One server's part of a request.

    Attributes:
        connection: the stream on which it answers us.
        request: as we would send it ourselves; of all but the first only the fields and the answer's size are used.
        answered: told of its answer, which may come after the last server's.
        deadline, clock: as of any call; the clock starts when the server before has handed over.
        call_id: of the request on this stream.
        is_answered: whether the answer is here.
    """

    connection: PeerConnection
    request: Message
    answered: Callable[[Message], None] = lambda reply: None
    deadline: float | None = None
    clock: ServiceClock = field(default_factory=ServiceClock)
    call_id: int = 0
    is_answered: bool = False

    def __post_init__(self) -> None:
        self.call_id = self.connection.next_id()


class Handover:
    """Sends the first stage, with the route through the others, and takes the answers of all.

    Args:
        stages: at least two, in the order of handing over.
    """

    def __init__(self, stages: Sequence[Stage]):
        self._stages = stages

    async def last(self) -> Message:
        """The last server's answer, as soon as it is here; the others' go on being waited for in the background.

        Raises:
            PeerFailure: of whichever server failed first. What the others do is cancelled.
        """
        return (await self._run(slice(-1, None)))[0]

    async def all(self) -> list[Message]:
        """The answers of all servers. Raises as `last`."""
        return await self._run(slice(None))

    async def _run(self, which: slice) -> list[Message]:
        first, *others = self._stages
        first.request.fields["route"] = [
            _hop(stage, before.connection.peer).to_value() for before, stage in pairwise(self._stages)
        ]
        # Expected before they are sent for: no answer can be early.
        expected = [
            asyncio.create_task(
                s.connection.expect(s.call_id, max_bytes=s.request.answer_bytes, deadline=s.deadline, clock=s.clock)
            )
            for s in others
        ]
        sent = first.connection.call(first.request, first.call_id, deadline=first.deadline, clock=first.clock)
        calls = [asyncio.create_task(sent), *expected]
        for number, call in enumerate(calls):
            call.add_done_callback(partial(self._note, number))
        needed, waiting = calls[which], set(calls)
        try:
            while not all(call.done() for call in needed):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not all(call.done() for call in needed):
                    for call in done:
                        call.result()
            return [call.result() for call in needed]
        except BaseException:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            raise

    def _note(self, number: int, call: asyncio.Task[Message]) -> None:
        if call.cancelled() or call.exception() is not None:
            return  # who waits for it is told; if nobody does any more, the result is there without it
        stage, following = self._stages[number], self._stages[number + 1 : number + 2]
        stage.clock.hold()
        for other in following:
            if other.clock.is_held and not other.is_answered:
                other.clock.restart()
        stage.is_answered = True
        stage.answered(call.result())


class HandoverPolicy:
    """Whether servers are to hand over, and which have failed to: those are left to the direct way for a while."""

    def __init__(self, config: ClientConfig):
        # A server that could tell which requests are never audited would lie in those.
        self.is_on = config.server_to_server and config.audit_rate == 0
        self._avoided: dict[tuple[str, ...], tuple[float, float]] = {}  # until, and for how long

    def allows(self, connections: Sequence[ServerConnection | None]) -> bool:
        """Whether a request may be handed over along these servers."""
        if not self.is_on or len(connections) < 2:
            return False
        peers = []
        for connection in connections:
            if connection is None or not connection.is_open or not _can_take_over(connection):
                return False
            peers.append(connection.peer)
        until, _ = self._avoided.get(tuple(peers), (0.0, 0.0))
        return time.monotonic() > until

    def avoid(self, peers: Sequence[str], why: object) -> None:
        """Goes the direct way along these servers, longer every time."""
        now = time.monotonic()
        until, period = self._avoided.get(tuple(peers), (0.0, 0.0))
        if until > now:
            return  # several requests in flight tell of one reason
        self._avoided = {route: entry for route, entry in self._avoided.items() if entry[0] + entry[1] > now}
        period = min(2 * period, _MAX_AVOID_PERIOD) or _AVOID_PERIOD
        self._avoided[tuple(peers)] = now + period, period
        names = ", ".join(f"…{peer[-6:]}" for peer in peers)
        logger.info("servers %s do not hand over to each other for %.0f s: %s", names, period, why)


def _can_take_over(connection: ServerConnection) -> bool:
    if not isinstance(connection, PeerConnection):
        return False  # it offers only Petals' methods
    stream, key = connection.info.get("stream"), connection.info.get("stream_key")
    return type(stream) is int and 0 <= stream < 1 << 63 and isinstance(key, bytes) and len(key) == STREAM_KEY_BYTES


def _hop(stage: Stage, bearer: str) -> Hop:
    connection = stage.connection
    permit = make_permit(connection.info["stream_key"], bearer, stage.call_id)
    return Hop(connection.peer, connection.info["stream"], stage.call_id, permit, stage.request.fields)
