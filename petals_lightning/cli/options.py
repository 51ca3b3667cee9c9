"""Options that several commands share."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from petals_lightning.library_messages import OursOrErrors

_MADDR = "MADDR"
_IS_MADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr|p2p)/")

InitialPeers = Annotated[
    list[str] | None, typer.Option(help="Multiaddresses of one or more peers to join.", metavar=_MADDR)
]
HostMaddrs = Annotated[list[str], typer.Option(help="Addresses to listen on.", metavar=_MADDR)]
AnnounceMaddrs = Annotated[
    list[str] | None,
    typer.Option(help="Addresses that others are told, where they differ (NAT, containers).", metavar=_MADDR),
]
IdentityPath = Annotated[
    str | None, typer.Option(help="File of the private key, made if missing; keeps the peer id the same.")
]


class MaddrCommand(TyperCommand):
    """A command whose options of multiaddresses may be followed by several; options of typer take one each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for each in self.params if getattr(each, "metavar", None) == _MADDR for name in each.opts}
        return super().parse_args(ctx, list(_one_address_each(args, names)))


def _one_address_each(words: Iterable[str], options: set[str]) -> Iterator[str]:
    """The words of a command line with an option in front of each address that follows one."""
    rest, option = iter(words), None
    for word in rest:
        if word in options:
            option = word
            yield from (word, *(value for value in [next(rest, None)] if value is not None))
        elif option is not None and _IS_MADDR.match(word):
            yield from (option, word)
        else:
            name, _, _ = word.partition("=")
            option = name if name in options else None
            yield word
        if word == "--":
            yield from rest


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
