"""Hooks for one pass of a module that other threads may run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Limits a forward hook or pre-hook to passes of this thread."""
    owner = threading.get_ident()

    def run(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    return run
