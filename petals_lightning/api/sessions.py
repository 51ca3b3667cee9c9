"""Sessions between requests: a conversation that goes on finds its keys and values still on the servers."""

from __future__ import annotations

import threading
import time
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any

import torch

from petals_lightning.models.generation import GenerationSession


@dataclass(eq=False)
class OpenSession:
    """A session of a model, and the context in which the model's `generate` continues it.

    Attributes:
        since: when it was last used.
    """

    model: Any
    session: GenerationSession
    context: Context
    since: float = 0.0

    @classmethod
    def open(cls, model: Any, max_length: int) -> OpenSession:
        context = copy_context()
        session = model.inference_session(max_length=max_length)
        context.run(session.__enter__)
        return cls(model, session, context)

    def count_known(self, ids: torch.Tensor) -> int:
        """The number of first tokens of [T] that the session has, too."""
        if self.session.tokens is None:
            return 0
        known = self.session.tokens[0]
        length = min(len(known), len(ids))
        differing = (known[:length] != ids[:length]).nonzero()
        return int(differing[0]) if len(differing) else length


class SessionPool:
    """Idle sessions, for requests that begin with the same tokens. Its methods may be called from any thread.

    A session is used again if more than half of its tokens are the first ones of the request: it goes back to the first
    token that differs. With less in common, it is another conversation, which may go on later.

    Args:
        most_idle: sessions that are kept between requests; the one unused for longest is closed first.
    """

    def __init__(self, most_idle: int):
        self._most_idle = most_idle
        self._idle: list[OpenSession] = []
        self._lock = threading.Lock()

    def take(self, model: Any, ids: torch.Tensor, *, needed: int, max_length: int) -> tuple[OpenSession, int]:
        """A session at the end of the tokens that it shares with [T], and how many these are; less than T.

        Args:
            model: whose session it is.
            ids: all tokens of the request.
            needed: tokens for which the session must have room.
            max_length: tokens for which a new one has room.
        """
        with self._lock:
            shared = {
                each: each.count_known(ids)
                for each in self._idle
                if each.model is model and each.session.max_length >= needed
            }
            best = max(shared, key=lambda each: shared[each], default=None)
            if best is not None and 2 * shared[best] > best.session.tokens.shape[1]:  # type: ignore[union-attr]
                self._idle.remove(best)
                known = min(shared[best], len(ids) - 1)
                best.session.position = known
                return best, known
        return OpenSession.open(model, max_length), 0

    def give_back(self, used: OpenSession) -> None:
        """Keeps a session for later requests."""
        used.since = time.monotonic()
        with self._lock:
            self._idle.append(used)
            excess = max(len(self._idle) - self._most_idle, 0)
            closed, self._idle = self._idle[:excess], self._idle[excess:]
        for each in closed:
            each.session.close()

    def close_idle(self, unused_for: float = 0.0) -> int:
        """Closes the sessions that were not used for so many seconds, and returns their number."""
        until = time.monotonic() - unused_for
        with self._lock:
            closed = [each for each in self._idle if each.since <= until]
            self._idle = [each for each in self._idle if each.since > until]
        for each in closed:
            each.session.close()
        return len(closed)
