"""Keeps several evaluation batches in flight.

Their forwards do not depend on each other, so none has to wait for the swarm's answer to the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

BEGUN = "_begun_forward"
"""The entry of a batch that holds the future of its forward."""


class BatchesInFlight:
    """A DataLoader whose batches come in order, each with its forward begun, and up to `size` - 1 of those behind it.

    Args:
        loader: gives batches, which are dicts; others come as they are.
        begin: takes a batch, returns the same with its forward begun under `BEGUN`.
        size: forwards begun and not yet taken, at most; so many batches are in memory.
        limit: how many batches will be taken at most, asked at the start of each pass; None: all.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        begin: Callable[[dict[str, Any]], dict[str, Any]],
        size: int,
        limit: Callable[[], int | None],
    ):
        self._loader, self._begin, self._size, self._limit = loader, begin, size, limit

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises TypeError where there is none, as len() should

    def __iter__(self) -> Iterator[Any]:
        window: deque[Any] = deque()
        for batch in islice(self._loader, self._limit()):
            window.append(self._begin(batch) if isinstance(batch, dict) else batch)
            if len(window) == self._size:
                yield window.popleft()
        yield from window

    def __getattr__(self, name: str) -> Any:
        """What callbacks look for on a DataLoader, e.g. `dataset`."""
        if name == "_loader":  # while it is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)
