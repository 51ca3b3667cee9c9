"""One server's part of an inference session, from the client's side: data only.

Shapes: B batch, P virtual tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from petals_lightning.client.input_history import InputHistory
from petals_lightning.client.server_connection import ServerConnection
from petals_lightning.protocol.messages import Message, Method


@dataclass
class SessionLeg:
    """Blocks [start, end) of a session on one server.

    Attributes:
        history: inputs of all positions.
        prefix: [P, H] that enters the leg, if there are prompts; None until the previous leg has run.
        number: of the session on the server; None while the server has no session.
        held: number of positions that the server holds.
        reordering: of the batch, not yet sent to the server; None: none.
    """

    start: int
    end: int
    peer: str
    history: InputHistory = field(default_factory=InputHistory)
    prefix: torch.Tensor | None = None
    connection: ServerConnection | None = None
    number: int | None = None
    held: int = 0
    reordering: torch.Tensor | None = None

    def rewind(self, position: int) -> None:
        """Drops positions from `position` on; the server does so at the next step."""
        self.history.crop(position)
        self.held = min(self.held, position)

    def reorder(self, hypo_ids: torch.Tensor) -> None:
        self.history.reorder(hypo_ids)
        self.reordering = hypo_ids if self.reordering is None else self.reordering[hypo_ids]

    def settle(self) -> None:
        """Drops the inputs that have not arrived; the previous server computes them again."""
        self.history.drop_missing()
        self.held = min(self.held, self.history.length)

    def leave(self) -> None:
        """Abandons the server's session: the next step starts from the inputs kept here."""
        if self.number is not None and self.connection is not None:
            self.connection.tell(Message(Method.END_SESSION, {"session": self.number}))
        self.number, self.held, self.reordering = None, 0, None
