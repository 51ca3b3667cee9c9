"""Servers in processes of their own, which can be killed, stopped and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from petals_lightning.cli.main import main
from petals_lightning.strategies.server_process import ServerProcess
from tools.testing.forks import ForkedProcess
from tools.testing.swarms import LOOPBACK, PREFIX


def start_server(
    checkpoint: Path | str,
    span: tuple[int, int] | None = None,
    initial_peers: Sequence[str] = (),
    *extra: str,
    program: Callable[[], None] = main,
) -> ServerProcess:
    """Starts `petals-lightning serve` on loopback; it is not ready yet.

    Args:
        checkpoint: the model.
        span: blocks that it holds; None for all.
        initial_peers: of the swarm to join; none for a new swarm.
        extra: further options; they win over those given here.
        program: what is run in place of the executable `petals-lightning`.
    """
    join = [item for peer in initial_peers for item in ("--initial-peers", peer)] or ["--new-swarm"]
    blocks = ["--block-indices", f"{span[0]}:{span[1]}"] if span is not None else []
    arguments = [
        "serve", str(checkpoint), *join, *blocks, "--dht-prefix", PREFIX, "--host-maddrs", *LOOPBACK,
        "--threads", "1", *extra,
    ]  # fmt: skip
    return ServerProcess(ForkedProcess(program, arguments), f"a server of blocks {span or 'all'}").start()


def start_http(*arguments: str) -> tuple[ServerProcess, str]:
    """Starts `petals-lightning api` or `dashboard` on a free port; gives the process, which is ready, and its URL."""
    server = ServerProcess(ForkedProcess(main, [*arguments, "--port", "0"]), f"petals-lightning {arguments[0]}").start()
    server.wait_until_ready()
    return server, next(line for line in server.lines if line.startswith("ready:")).split()[-1]
