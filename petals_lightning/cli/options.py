"""Options that several commands share."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Annotated

import typer

from petals_lightning.library_messages import OursOrErrors

InitialPeers = Annotated[
    list[str] | None, typer.Option(help="Multiaddress of a peer to join; repeat for several.", metavar="MADDR")
]
HostMaddrs = Annotated[list[str], typer.Option(help="Address to listen on; repeat for several.", metavar="MADDR")]
AnnounceMaddrs = Annotated[
    list[str] | None,
    typer.Option(help="Address that others are told, where it differs (NAT, containers).", metavar="MADDR"),
]
IdentityPath = Annotated[
    str | None, typer.Option(help="File of the private key, made if missing; keeps the peer id the same.")
]


def configure_logging(with_libraries: bool = False) -> None:
    """Log lines with a time on stderr: ours, and with `with_libraries` also warnings and messages of others."""
    handler = logging.StreamHandler()
    if not with_libraries:
        handler.addFilter(OursOrErrors())
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler], force=True
    )


def say(line: str) -> None:
    """A line on stdout, at once: scripts and parents read these."""
    print(line, flush=True)


class StopSignal:
    """Turns SIGINT and SIGTERM into an event; the first asks to leave in order, a second one interrupts."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def wait_while(self, alive: Callable[[], bool]) -> bool:
        """Waits for a signal; False if `alive` became false before one came."""
        while not self._event.wait(1.0):  # short waits: a signal handler runs between them
            if not alive():
                return False
        return True

    def _on_signal(self, number: int, frame: object) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
