"""Adapters that a server holds for all its clients."""

from __future__ import annotations

from collections.abc import Sequence

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.server.refusal import Refusal


class HeldAdapters:
    """Adapters by the names under which clients choose them.

    Args:
        adapters: named, of all hosted blocks, on their device.
    """

    def __init__(self, adapters: Sequence[Adapter] = ()):
        self._adapters = {adapter.name: adapter for adapter in adapters if adapter.name is not None}
        self._acting: dict[tuple[str, int, int], Adapter] = {}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the adapters, by name."""
        return {name: adapter.fingerprint or "" for name, adapter in self._adapters.items()}

    def acting(self, name: str, start: int, end: int) -> Adapter:
        """An adapter of blocks [start, end) without tensors of its own, in which the named one is active.

        It is always the same object, so that sessions of several clients with it may run as one batch.

        Raises:
            Refusal: no adapter of this name is held.
        """
        if name not in self._adapters:
            there_are = f"; there are {', '.join(self._adapters)}" if self._adapters else ", nor any other"
            raise Refusal(ErrorCode.NOT_SERVED, f"no adapter {name!r:.60} is held here{there_are}")
        key = name, start, end
        if key not in self._acting:
            self._acting[key] = Adapter(start, end, active=self._adapters[name].between(start, end))
        return self._acting[key]
