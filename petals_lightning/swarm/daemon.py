"""Starts libp2p's daemon (`p2pd`, shipped with hivemind) and connects hivemind's `P2P` to it.

`hivemind.P2P.create` starts the daemon too, but in the terminal's process group: Ctrl-C would then end it before a
server could say that it leaves. Here it gets a session of its own and a guard that ends it with us.
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
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

from hivemind.p2p import P2P
from hivemind.utils.multiaddr import Multiaddr

from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.protocol.identity import Identity
from petals_lightning.swarm.guard import ProcessGuard
from petals_lightning.swarm.hivemind_patches import acknowledge_end, repair_unary_calls

logger = logging.getLogger(__name__)

_LONGEST_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes: the kernel's limits less the final zero


class P2PDaemon:
    """One `p2pd` process and the `P2P` object that talks to it.

    Args:
        initial_peers: multiaddresses to connect to at start.
        host_maddrs: addresses to listen on; empty: do not listen.
        announce_maddrs: addresses that others are told, where they differ.
        identity_path: file of the private key, made if missing; None for a throw-away identity.
        dht_server: take part in libp2p's own DHT as a server (peers that listen do).
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
    ):
        self._socket = os.path.join(tempfile.gettempdir(), f"petals-lightning-p2pd-{secrets.token_hex(6)}.sock")
        on_loopback = all(maddr.startswith(("/ip4/127.", "/ip6/::1/")) for maddr in host_maddrs)
        options: dict[str, object] = {
            "listen": f"/unix{self._socket}",
            "b": int(bool(initial_peers)),
            "dhtServer" if dht_server else "dhtClient": 1,
            "connManager": 1,
            "tls": 1,
            "relay": 1,
            "autonat": 1,
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
        self._arguments = [f"-{name}={value}" for name, value in options.items()]
        self._identity_path, self._start_timeout = identity_path, start_timeout
        self._identity: Identity | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)
        self._process: subprocess.Popen[str] | None = None
        self._guard: ProcessGuard | None = None
        self._p2p: P2P | None = None

    async def start(self) -> P2P:
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
        self._guard = ProcessGuard()
        if self._identity_path is None:
            self._identity, path = Identity.new(), self._socket + ".id"
            _write_key(path, self._identity.encoded)
        else:
            path = self._identity_path
            self._identity = read_identity(path)
        with as_file(files("hivemind.hivemind_cli") / "p2pd") as executable:
            self._process = subprocess.Popen(
                [str(executable), *self._arguments, f"-id={path}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={"GOLOG_LOG_LEVEL": "error", **os.environ},
                start_new_session=True,
            )
        self._guard.protect(self._process.pid, self._socket, *([path] if self._identity_path is None else []))
        threading.Thread(target=self._drain_output, name="p2pd-log", daemon=True).start()
        deadline = asyncio.get_running_loop().time() + self._start_timeout
        while not os.path.exists(self._socket):
            if self._process.poll() is not None:
                raise SwarmConnectionError(self.last_words())
            if asyncio.get_running_loop().time() > deadline:
                raise SwarmConnectionError(f"the libp2p daemon was not up after {self._start_timeout:.0f} s")
            await asyncio.sleep(0.01)
        while self._p2p is None:
            try:
                self._p2p = await P2P.replicate(Multiaddr(f"/unix{self._socket}"))
            except ConnectionError:  # the socket's file exists a moment before it accepts
                if self._process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                    raise SwarmConnectionError(self.last_words()) from None
                await asyncio.sleep(0.01)
        self._forget_key()
        repair_unary_calls(self._p2p._client.control)
        self._guard.protect(self._process.pid, self._p2p._client_listen_maddr["unix"])
        return self._p2p

    @property
    def identity(self) -> Identity:
        assert self._identity is not None, "the daemon has not been started"
        return self._identity

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def stop(self) -> None:
        if self._p2p is not None:
            await self._p2p.shutdown()
            acknowledge_end(self._p2p._client.control)
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, 5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._guard is not None:
            self._guard.release()
        with suppress(FileNotFoundError):
            os.remove(self._socket)
        self._forget_key()

    def _forget_key(self) -> None:
        """Removes the file of a throw-away key, which the daemon has read."""
        if self._identity_path is None:
            with suppress(FileNotFoundError):
                os.remove(self._socket + ".id")

    def _drain_output(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._last_lines.append(line.strip())
                logger.debug("p2pd: %s", line.strip())

    def last_words(self) -> str:
        """The last line that the daemon wrote."""
        said = next((line for line in reversed(self._last_lines) if line), "the libp2p daemon ended without a word")
        return re.sub(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ", "", said)


def read_identity(path: str) -> Identity:
    """The key in an identity file, which is made if it is missing.

    Raises:
        SwarmConnectionError: it can be neither read nor written.
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
