"""A server as a child process: start, log, and stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from petals_lightning.errors import SwarmError


class ServerProcess:
    """Runs `petals-lightning serve` with its output in a file.

    Args:
        arguments: the command line after `serve`.
        log_path: file for the server's output.
        title: name of the server in errors, e.g. `server 0 (blocks 0:2)`.
    """

    def __init__(self, arguments: list[str], log_path: Path, title: str):
        self.title, self.log_path = title, log_path
        self._addresses: list[str] = []
        self._has_address, self._is_ready = threading.Event(), threading.Event()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "petals_lightning.cli.main", "serve", *arguments]
        # Spinning OpenMP threads of several processes on the same cores would slow each other down a hundredfold.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        # A session of its own: Ctrl-C in the terminal must not take servers away while the client saves its work.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {title}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def addresses(self) -> list[str]:
        """Multiaddresses that the server has printed so far."""
        return list(self._addresses)

    def wait_for_address(self, deadline: float) -> list[str]:
        """Returns the server's multiaddresses as soon as it listens. Raises as `wait_until_ready`."""
        self._wait(self._has_address, deadline)
        return self.addresses

    def wait_until_ready(self, deadline: float) -> None:
        """Returns when the server has announced its blocks.

        Raises:
            SwarmError: it ended, or is not ready at `deadline` (in `time.monotonic` seconds). The message has the last
                lines of its log.
        """
        self._wait(self._is_ready, deadline)

    def interrupt(self) -> None:
        """Asks the server to leave the swarm."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def wait(self, deadline: float) -> None:
        """Returns when the server has ended. Kills it at `deadline`."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=1)

    def _wait(self, event: threading.Event, deadline: float) -> None:
        while not event.wait(0.05):
            if self._process.poll() is not None:
                self._reader.join(timeout=1)
                if event.is_set():
                    return
                raise SwarmError(
                    f"{self.title} ended while starting (exit code {self._process.returncode}); its last words: "
                    f"{self._last_words()} [log: {self.log_path}]"
                )
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"{self.title} is not ready in time; raise start_timeout if the model is large. Its last "
                    f"words: {self._last_words()} [log: {self.log_path}]"
                )

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, open(self.log_path, "w", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if line.startswith("multiaddress:"):
                    self._addresses.append(line.split(":", 1)[1].strip())
                    self._has_address.set()
                if line.startswith("ready:"):
                    self._is_ready.set()

    def _last_words(self, count: int = 3) -> str:
        lines = [line.strip() for line in self.log_path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return " | ".join(lines[-count:]) or "(none)"
