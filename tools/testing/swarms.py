"""Real swarms for tests: servers in this process (quick), or as processes (to be killed)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from petals_lightning.cli.main import main
from petals_lightning.hf import Checkpoint
from petals_lightning.models import remote_blocks
from petals_lightning.server.access import AccessRules
from petals_lightning.server.limits import ServerLimits
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
PREFIX = "tiny"
SERVERS = ("ours", "petals", "mixed")
"""Kinds of swarms: of our servers, of such that offer Petals' methods alone, of both by turns."""


def is_petals_only(servers: str, number: int) -> bool:
    """Whether a server, counted from 0, offers Petals' methods alone in a swarm of that kind."""
    return servers == "petals" or (servers == "mixed" and number % 2 == 1)


def serve_options(servers: str, number: int) -> tuple[str, ...]:
    """What `petals-lightning serve` is told for that server."""
    return ("--petals-only",) if is_petals_only(servers, number) else ()


class InProcessSwarm:
    """Servers with peers of their own (each with its libp2p daemon), all in this process.

    Args:
        checkpoint: the model.
        spans: blocks of each server.
        dtype, limits, rules, prefix: for all servers.
        servers: one of `SERVERS`.
        share_prefix, device, throughput: as of `Server`.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        spans: Sequence[tuple[int, int]],
        *,
        dtype: str = "auto",
        limits: ServerLimits | None = None,
        rules: AccessRules | None = None,
        prefix: str = PREFIX,
        initial_peers: Sequence[str] = (),
        servers: str = "ours",
        share_prefix: bool = True,
        device: torch.device | str = "cpu",
        throughput: float | None = None,
    ):
        self._checkpoint, self._spans, self._kind, self._dtype = str(checkpoint), spans, servers, dtype
        self._limits, self._prefix, self._initial_peers = limits, prefix, initial_peers
        self._rules, self._share_prefix, self._device = rules, share_prefix, device
        self._throughput = throughput
        self.servers: list[Server] = []
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()  # their blocks; of what a test drops nothing is kept
        self._client: SwarmNode | None = None

    def load(self, auto_class: Any, *, shared_peer: bool = False, **options: Any) -> Any:
        """The model through this swarm, by a peer of its own or by one for all; it is closed with the swarm."""
        if shared_peer:
            if self._client is None:
                self._client = SwarmNode(self.initial_peers, host_maddrs=(), client_mode=True).start()
            options["node"] = self._client
        elif "initial_peers" not in options:
            options["initial_peers"] = self.initial_peers
        options = {"dht_prefix": self._prefix, **options}
        model = auto_class.from_pretrained(self._checkpoint, **options)
        self._models.add(remote_blocks(model))
        return model

    @property
    def initial_peers(self) -> list[str]:
        return self.servers[0].node.visible_maddrs()

    def __enter__(self) -> InProcessSwarm:
        for number, span in enumerate(self._spans):
            peers = self.initial_peers if self.servers else self._initial_peers
            server = Server(
                Checkpoint(self._checkpoint),
                SwarmNode(peers, host_maddrs=LOOPBACK),
                block_indices=span,
                dht_prefix=self._prefix,
                dtype=self._dtype,
                limits=self._limits,
                rules=self._rules,
                petals_only=is_petals_only(self._kind, number),
                share_prefix=self._share_prefix,
                device=self._device,
                throughput=self._throughput,
                update_period=30,
            )
            server.start()
            self.servers.append(server)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for layers in list(self._models):
            layers.close()
        if self._client is not None:
            self._client.close()
        for server in reversed(self.servers):
            server.stop(timeout=1)


class ServerProcess:
    """`petals-lightning serve` with these options, in a process of its own.

    It is forked from one that has imported what every server imports, which takes several seconds of a core each time.

    Args:
        checkpoint: the model.
        span: blocks that it holds; None for all.
        initial_peers: of the swarm to join; none for a new swarm.
        extra: further options.
        program: what is run in place of the executable `petals-lightning`.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        span: tuple[int, int] | None,
        initial_peers: Sequence[str] = (),
        *extra: str,
        program: Callable[[], None] = main,
    ):
        join = [item for peer in initial_peers for item in ("--initial-peers", peer)] or ["--new-swarm"]
        blocks = ["--block-indices", f"{span[0]}:{span[1]}"] if span is not None else []
        command = [
            "serve", str(checkpoint), *join, *blocks, "--dht-prefix", PREFIX, "--host-maddrs", *LOOPBACK,
            "--threads", "1", *extra,
        ]  # fmt: skip
        (self._output, output), (self._errors, errors) = _FORKS.Pipe(duplex=False), _FORKS.Pipe(duplex=False)
        self.process = _FORKS.Process(target=_run, args=(program, command, output, errors), daemon=True)
        self.process.start()
        for end in (output, errors):
            end.close()
        self.errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()

    @property
    def maddr(self) -> str:
        return self._maddr

    def wait_ready(self) -> ServerProcess:
        with open(os.dup(self._output.fileno())) as lines:
            for line in lines:
                if line.startswith("multiaddress:"):
                    self._maddr = line.split()[1]
                if line.startswith("ready"):
                    return self
        raise RuntimeError(f"the server ended: {''.join(self.errors)}")

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def peer_id(self) -> str:
        return self.maddr.rsplit("/", 1)[-1]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        """How the process ended (minus the signal's number), or None if it has not."""
        self.process.join(seconds)
        return self.process.exitcode

    def stop(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.terminate()
            self.process.join(10)
            self.process.kill()
            self.process.join()
        self._output.close()

    def _drain(self) -> None:
        with open(os.dup(self._errors.fileno())) as lines:
            self.errors.extend(lines)


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["petals_lightning.cli.app", "petals_lightning.server.server"])


def _run(program: Callable[[], None], command: list[str], output: Connection, errors: Connection) -> None:
    """What an executable does with a command line, with `output` and `errors` as its standard streams."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.argv = ["petals-lightning", *command]
    program()
