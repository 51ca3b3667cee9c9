"""Shared by `api` and `dashboard`: where they listen, who may use them, and the HTTP server."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petals_lightning.cli.options import StopSignal, say
from petals_lightning.errors import ConfigurationError, SwarmConnectionError

if TYPE_CHECKING:
    from petals_lightning.swarm import SwarmNode

Host = Annotated[str, typer.Option(help="Address to listen on. Beyond this machine, --api-key-file is needed.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File of keys, one a line; callers need one of them.", metavar="FILE")
]
Run = Annotated[
    Path | None,
    typer.Option(help="Folder of a training run, or of several: the page shows the newest curve.", metavar="DIR"),
]


def check_access(host: str, api_key_file: Path | None) -> list[str] | None:
    """The keys, of which callers need one; None if they need none.

    Raises:
        ConfigurationError: everybody could use the server; the keys cannot be read; or a library is missing.
    """
    try:
        from petals_lightning.api.app import is_loopback, read_keys
    except ModuleNotFoundError as e:
        raise ConfigurationError(f"{e.name} is missing: pip install 'petals-lightning[api]'") from e
    if api_key_file is not None:
        return read_keys(api_key_file)
    if not is_loopback(host):
        raise ConfigurationError(
            f"--host {host} lets other machines in: give --api-key-file FILE with a key for them, e.g. made by "
            "`openssl rand -hex 24`; or leave --host out"
        )
    return None


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigurationError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as e:
        listening.close()
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {e.strerror}; choose others") from e
    return listening


def run_app(app: Any, listening: socket.socket, what: str, node: SwarmNode) -> None:
    """Serves an application until SIGINT or SIGTERM.

    Raises:
        SwarmConnectionError: `node`, this process's peer, has ended.
    """
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=5, server_header=False, lifespan="on"
    )

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            if counter % 10 == 0 and not node.is_alive:  # every second
                self.should_exit = True
            return await super().on_tick(counter)

    # uvicorn raises the signal that stopped it once more, which would kill the process before it cleans up.
    StopSignal()
    host, port = listening.getsockname()[:2]
    say(f"ready: {what} on http://{f'[{host}]' if ':' in host else host}:{port}")
    Server(config).run(sockets=[listening])
    if not node.is_alive:
        raise SwarmConnectionError("the libp2p daemon of this process has ended; start it again")
