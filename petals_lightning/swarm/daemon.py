"""Starts libp2p's daemon (`p2pd`, shipped with hivemind) and connects hivemind's `P2P` to it.

`hivemind.P2P.create` starts the daemon too, but in the terminal's process group: Ctrl-C would end it before a server
could announce that it leaves. Here it gets a session of its own, and a guard that ends it with this process.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import IO

from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.protocol.identity import Identity
from petals_lightning.swarm.guard import ProcessGuard
from petals_lightning.swarm.hivemind_patches import patch_unary_calls, retrieve_exceptions

logger = logging.getLogger(__name__)

_LONGEST_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes: the kernel's limits less the final zero


def is_loopback(maddr: str) -> bool:
    """Whether only this machine can call an address."""
    return maddr.startswith(("/ip4/127.", "/ip6/::1/"))


class P2PDaemon:
    """The settings of a `p2pd` process; `start` starts it.

    Args:
        initial_peers: multiaddresses to connect to at start.
        host_maddrs: addresses to listen on; empty: do not listen.
        announce_maddrs: addresses to announce to others, if they differ.
        identity_path: file of the private key, made if missing; None for a throw-away identity.
        dht_server: take part in libp2p's own DHT as a server (peers that listen do).
        is_reachable: whether others can call this peer; None: libp2p finds out, in some minutes. One that can be called
            is a relay for others, and uses one processor (GOMAXPROCS in the environment: another number). One that
            cannot has its calls relayed by initial peers, and tries to get a direct connection to each caller (hole
            punching).
        start_timeout: seconds until the daemon must answer.
    """

    def __init__(
        self,
        *,
        initial_peers: Sequence[str],
        host_maddrs: Sequence[str],
        announce_maddrs: Sequence[str],
        identity_path: str | None,
        dht_server: bool,
        start_timeout: float,
        is_reachable: bool | None = None,
    ):
        self._socket = os.path.join(tempfile.gettempdir(), f"petals-lightning-p2pd-{secrets.token_hex(6)}.sock")
        on_loopback = all(map(is_loopback, host_maddrs))
        options: dict[str, object] = {
            "listen": f"/unix{self._socket}",
            "b": int(bool(initial_peers)),
            "dhtServer" if dht_server else "dhtClient": 1,
            "connManager": 1,
            "tls": 1,
            "relay": 1,
            "autonat": 1,  # also enables hole punching
            "natPortMap": int(not on_loopback),
            "idleTimeout": "30s",
        }
        if initial_peers:
            options["bootstrapPeers"] = ",".join(initial_peers)
        if host_maddrs:
            options["hostAddrs"] = ",".join(host_maddrs)
        else:
            options["noListenAddrs"] = 1
        if announce_maddrs:
            options["announceAddrs"] = ",".join(announce_maddrs)
        self._environment = {"GOLOG_LOG_LEVEL": "error"}
        if is_reachable:
            options["forceReachabilityPublic"] = 1
            self._environment["GOMAXPROCS"] = "1"  # relays.py says why
        elif is_reachable is not None:
            relays = ",".join(maddr for maddr in initial_peers if "/p2p-circuit" not in maddr)
            options |= {"forceReachabilityPrivate": 1, "autoRelay": 1, "relayDiscovery": 0, "trustedRelays": relays}
        self._arguments = [f"-{name}={value}" for name, value in options.items()]
        self._identity_path, self._start_timeout = identity_path, start_timeout

    async def start(self) -> RunningDaemon:
        """Starts the daemon.

        Raises:
            SwarmConnectionError: it ends (no initial peer reached, port taken) or is not up in time.
            ConfigurationError: the identity file holds no key, or the path of the socket is too long.
        """
        if len(os.fsencode(self._socket)) > _LONGEST_SOCKET_PATH:
            folder = os.path.dirname(self._socket)
            raise ConfigurationError(
                f"TMPDIR={folder}: its {len(os.fsencode(folder))} characters are too long for the socket that is made "
                f"there, whose path may have {_LONGEST_SOCKET_PATH} in all; set TMPDIR to a shorter folder, e.g. /tmp"
            )
        async with AsyncExitStack() as started:
            guard = ProcessGuard.start()
            started.callback(guard.release)
            if self._identity_path is None:
                identity, path = Identity.new(), self._socket + ".id"
                started.callback(_remove, path)
                _write_key(path, identity.encoded)
            else:
                path = self._identity_path
                identity = read_identity(path)
            with as_file(files("hivemind.hivemind_cli") / "p2pd") as executable:
                process = subprocess.Popen(  # noqa: ASYNC220 (takes milliseconds)
                    [str(executable), *self._arguments, f"-id={path}"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=self._environment | os.environ,
                    start_new_session=True,
                )
            started.callback(_remove, self._socket)
            started.push_async_callback(_end, process)
            guard.protect(process.pid, self._socket, *([path] if self._identity_path is None else []))
            log = _Log()
            threading.Thread(target=log.drain, args=(process.stdout,), name="p2pd-log", daemon=True).start()
            p2p = await self._connect(process, log)
            started.push_async_callback(_disconnect, p2p)
            if self._identity_path is None:
                _remove(path)  # the daemon has read it
            patch_unary_calls(p2p._client.control)
            guard.protect(process.pid, p2p._client_listen_maddr["unix"])
            return RunningDaemon(p2p, identity, process, log, started.pop_all())

    async def _connect(self, process: subprocess.Popen[str], log: _Log) -> P2P:
        """Waits for the daemon's socket and connects to it."""
        deadline = asyncio.get_running_loop().time() + self._start_timeout
        while not os.path.exists(self._socket):
            if process.poll() is not None:
                raise SwarmConnectionError(log.last_line())
            if asyncio.get_running_loop().time() > deadline:
                raise SwarmConnectionError(f"the libp2p daemon was not up after {self._start_timeout:.0f} s")
            await asyncio.sleep(0.01)
        while True:
            try:
                return await P2P.replicate(Multiaddr(f"/unix{self._socket}"))
            except ConnectionError:  # the socket's file exists a moment before it accepts connections
                if process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                    raise SwarmConnectionError(log.last_line()) from None
                await asyncio.sleep(0.01)


class RunningDaemon:
    """A `p2pd` process and the `P2P` object that talks to it; `P2PDaemon.start` makes one.

    Attributes:
        p2p: connected to the process.
        identity: the private key that the peer id follows from.
        process: the daemon's.
    """

    def __init__(
        self, p2p: P2P, identity: Identity, process: subprocess.Popen[str], log: _Log, started: AsyncExitStack
    ):
        self.p2p, self.identity, self.process = p2p, identity, process
        self._log, self._started = log, started

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def last_log_line(self) -> str:
        """The last line that the daemon wrote."""
        return self._log.last_line()

    async def stop(self) -> None:
        await self._started.aclose()


class _Log:
    """The last lines of a daemon's output."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=20)

    def drain(self, output: IO[str]) -> None:
        """Reads the output to its end, so that the daemon never waits for a reader."""
        with output:
            for line in output:
                self._lines.append(line.strip())
                logger.debug("p2pd: %s", line.strip())

    def last_line(self) -> str:
        """The last line without its time."""
        line = next((line for line in reversed(self._lines) if line), "the libp2p daemon ended without a word")
        return re.sub(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ", "", line)


async def _disconnect(p2p: P2P) -> None:
    await p2p.shutdown()
    retrieve_exceptions(p2p._client.control)


async def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        await asyncio.to_thread(process.wait, 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_identity(path: str) -> Identity:
    """Reads the key in an identity file; makes the file if it is missing.

    Raises:
        SwarmConnectionError: the file cannot be read or written.
        ConfigurationError: it holds no private key.
    """
    try:
        if not os.path.exists(path):
            _write_key(path, Identity.new().encoded)
        key = Path(path).read_bytes()
    except OSError as e:
        raise SwarmConnectionError(f"cannot read or write the identity file {path!r}: {e.strerror or e}") from e
    try:
        return Identity(key)
    except ValueError as e:
        raise ConfigurationError(
            f"the identity file {path!r} holds {e}: give the file that was made as one, or the name of a file that "
            "does not exist yet, where a key will be made"
        ) from e


def _write_key(path: str, key: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(key)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(path)
