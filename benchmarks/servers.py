"""Servers in processes of their own, until the end of a `with`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.swarm import PREFIX
from petals_lightning.cli.main import main
from petals_lightning.strategies.server_process import ServerProcess
from tools.testing.servers import start_server

Program = Callable[[], None]
Span = tuple[int, int]


@contextmanager
def running_server(
    model: str, threads: int, *extra: str, span: Span | None = None, join: Sequence[str] = (), program: Program = main
) -> Iterator[ServerProcess]:
    """A server of `span`, or of all blocks, in the swarm of the peers `join` or in a new one."""
    options = ("--threads", str(threads), "--dht-prefix", PREFIX, *extra)
    server = start_server(model, span, join, *options, program=program)
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


@contextmanager
def running_chain(
    model: str, spans: Sequence[Span], threads: int, *extra: str, program: Program = main
) -> Iterator[str]:
    """A server for each span; gives the first one's address."""
    with ExitStack() as stack:
        maddrs: list[str] = []
        for span in spans:
            server = running_server(model, threads, *extra, span=span, join=maddrs[:1], program=program)
            maddrs.append(stack.enter_context(server).maddr)
        yield maddrs[0]


def even_spans(blocks: int, count: int) -> list[Span]:
    """All blocks, cut into `count` spans of about the same length."""
    return [(blocks * part // count, blocks * (part + 1) // count) for part in range(count)]
