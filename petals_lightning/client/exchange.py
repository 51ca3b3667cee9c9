"""One request and its answers: to one server, or through several servers that hand it over to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from petals_lightning.client.connection import PeerConnection
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.client.timeouts import ServiceTimer
from petals_lightning.protocol.handover import Hop, make_permit
from petals_lightning.protocol.messages import Message


@dataclass
class Stage:
    """One server's part of a request.

    Attributes:
        connection: the stream on which the server answers.
        request: the request as this client would send it. For all but the first stage, only its fields and its answer's
            size are used.
        answered: called with the server's answer, which may come after the last server's.
        deadline, clock: as for any call. The clock starts when the previous server has handed over.
        call_id: of the request on this connection.
        is_answered: whether the answer has arrived.
    """

    connection: ServerConnection
    request: Message
    answered: Callable[[Message], None] = lambda reply: None
    deadline: float | None = None
    clock: ServiceTimer = field(default_factory=ServiceTimer)
    call_id: int = 0
    is_answered: bool = False

    def __post_init__(self) -> None:
        self.call_id = self.connection.next_id()


class Exchange:
    """Sends the request to the first stage, with the route through the others, and collects all answers.

    Args:
        stages: at least one, in the order of the hand-over. If there are several, `HandoverPolicy` allows it.
    """

    def __init__(self, stages: Sequence[Stage]):
        self._stages = stages

    async def last(self) -> Message:
        """The last server's answer, as soon as it arrives. The others are awaited in the background.

        Raises:
            PeerFailure: the first failure of any server. The other calls are cancelled.
        """
        return (await self._run(slice(-1, None)))[0]

    async def all(self) -> list[Message]:
        """The answers of all servers. Raises as `last`."""
        return await self._run(slice(None))

    async def _run(self, which: slice) -> list[Message]:
        first, *others = self._stages
        if others:
            first.request.fields["route"] = [
                _hop(stage, before.connection.peer).to_value() for before, stage in pairwise(self._stages)
            ]
        sent = first.connection.call(first.request, first.call_id, deadline=first.deadline, clock=first.clock)
        if not others:
            reply = await sent
            first.answered(reply)
            return [reply]
        # Answers are expected before the request is sent, so none can come too early.
        expected = [asyncio.create_task(_expected(stage)) for stage in others]
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
            return  # a caller that waits gets the error; otherwise the result is complete without this answer
        stage, following = self._stages[number], self._stages[number + 1 : number + 2]
        stage.clock.pause()
        for other in following:
            if other.clock.is_paused and not other.is_answered:
                other.clock.restart()
        stage.is_answered = True
        stage.answered(call.result())


async def _expected(stage: Stage) -> Message:
    connection = stage.connection
    assert isinstance(connection, PeerConnection), "only our own streams have requests handed over"
    return await connection.expect(
        stage.call_id, max_bytes=stage.request.answer_bytes, deadline=stage.deadline, clock=stage.clock
    )


def _hop(stage: Stage, bearer: str) -> Hop:
    connection = stage.connection
    permit = make_permit(connection.info["stream_key"], bearer, stage.call_id)
    return Hop(connection.peer, connection.info["stream"], stage.call_id, permit, stage.request.fields)
