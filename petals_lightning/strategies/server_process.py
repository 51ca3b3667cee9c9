"""A server as a child process: start, log, and stop. Tests and benchmarks start theirs in the same way."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

from petals_lightning.errors import SwarmError

_LAST_LINES = 200  # kept in memory


class Process(Protocol):
    """The part of `subprocess.Popen[str]` that `ServerProcess` needs."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdout(self) -> Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


def launch(arguments: Iterable[str], **options: Any) -> subprocess.Popen[str]:
    """Starts `petals-lightning` with stdout and stderr in one pipe.

    It has a session of its own, so Ctrl-C in the terminal does not reach it: servers stay while the client saves its
    work.

    Args:
        arguments: the command line after `petals-lightning`.
        **options: arguments of `subprocess.Popen` that replace the ones here.
    """
    # Spinning OpenMP threads of several processes on the same cores would slow each other down a hundredfold.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "env": environment}
    return subprocess.Popen(
        [sys.executable, "-m", "petals_lightning.cli.main", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        **settings | options,
    )


class ServerProcess:
    """A running `petals-lightning serve` or `bootstrap`. Its output tells its addresses and when it is ready.

    Args:
        process: the running command; see `launch`.
        title: name of the server in errors, e.g. `server 0 (blocks 0:2)`.
        log_path: file for the server's output; None for no file.

    Attributes:
        lines: the last lines of its output.
    """

    def __init__(self, process: Process, title: str, log_path: Path | None = None):
        self.title, self.log_path, self._process = title, log_path, process
        self.lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._addresses: list[str] = []
        self._has_address, self._is_ready = threading.Event(), threading.Event()
        self._reader = threading.Thread(target=self._read, name=f"log of {title}", daemon=True)

    def start(self) -> Self:
        """Starts to read what the command prints."""
        if self.log_path is not None:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._reader.start()
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def addresses(self) -> list[str]:
        """Multiaddresses that the server has printed so far."""
        return list(self._addresses)

    @property
    def maddr(self) -> str:
        """The server's first multiaddress."""
        return self._addresses[0]

    @property
    def peer_id(self) -> str:
        return self.maddr.rsplit("/", 1)[-1]

    def wait_for_address(self, deadline: float = math.inf) -> list[str]:
        """Returns the server's multiaddresses as soon as it listens. Raises as `wait_until_ready`."""
        self._wait(self._has_address, deadline)
        return self.addresses

    def wait_until_ready(self, deadline: float = math.inf) -> Self:
        """Returns when the server has announced its blocks.

        Raises:
            SwarmError: it ended, or is not ready at `deadline` (in `time.monotonic` seconds). The message has the last
                lines of its log.
        """
        self._wait(self._is_ready, deadline)
        return self

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal if the server still runs. SIGINT and SIGTERM ask it to leave the swarm."""
        if self.is_alive:
            self._process.send_signal(number)

    def wait(self, timeout: float) -> int | None:
        """Returns the exit code, as `subprocess` has it, or None if the server still runs after `timeout` seconds."""
        try:
            code = self._process.wait(max(0.0, timeout))
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(timeout=1)
        return code

    def stop(self, timeout: float = 10.0) -> None:
        """Asks the server to leave the swarm. Returns when it has ended; kills it after `timeout` seconds."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        self.kill_after(timeout)

    def kill_after(self, timeout: float) -> None:
        """Returns when the server has ended; kills it after `timeout` seconds."""
        if self.wait(timeout) is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._reader.join(timeout=1)

    def _wait(self, event: threading.Event, deadline: float) -> None:
        log = f" [log: {self.log_path}]" if self.log_path is not None else ""
        while not event.wait(0.05):
            if not self.is_alive:
                self._reader.join(timeout=1)
                if event.is_set():
                    return
                raise SwarmError(
                    f"{self.title} ended while starting (exit code {self._process.returncode}); its last words: "
                    f"{self._last_words()}{log}"
                )
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"{self.title} is not ready in time; raise start_timeout if the model is large. Its last "
                    f"words: {self._last_words()}{log}"
                )

    def _read(self) -> None:
        with self._process.stdout as lines, open(self.log_path or os.devnull, "w", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self.lines.append(line)
                if line.startswith("multiaddress:"):
                    self._addresses.append(line.split(":", 1)[1].strip())
                    self._has_address.set()
                if line.startswith("ready:"):
                    self._is_ready.set()

    def _last_words(self, count: int = 3) -> str:
        lines = [line.strip() for line in list(self.lines) if line.strip()]
        return " | ".join(lines[-count:]) or "(none)"
