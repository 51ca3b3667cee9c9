"""Processes that start quickly. This module imports little: each process imports it, too."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path

from petals_lightning.cli.main import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["petals_lightning.cli.app", "petals_lightning.server.server"])


class ForkedProcess:
    """A process with the interface of `subprocess.Popen` that `ServerProcess` needs.

    It is forked from one that has imported what every server imports: that takes several seconds of a core each time.

    Args:
        program: what it runs.
        arguments: the command line that the program sees.
    """

    def __init__(self, program: Callable[[], None], arguments: Sequence[str]):
        received, output = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_run, args=(program, arguments, output), daemon=True)
        self._lock = threading.Lock()  # an exit code can be read only once
        self._process.start()
        output.close()
        self.stdout = os.fdopen(os.dup(received.fileno()), errors="replace")
        received.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        connection.wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)


def run_command(
    *arguments: str, stdin: str = "", timeout: float = 120.0, program: Callable[[], None] = main
) -> subprocess.CompletedProcess[str]:
    """Runs `petals-lightning`, or `program` in its place, with these arguments to its end; `stdin` is what it reads."""
    with tempfile.TemporaryDirectory() as folder:
        given, output, errors = (Path(folder, name) for name in ("stdin", "stdout", "stderr"))
        given.write_text(stdin)
        process = _FORKS.Process(target=_run_on_files, args=(program, arguments, given, output, errors), daemon=True)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, output.read_bytes(), errors.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())


def _run_on_files(
    program: Callable[[], None], arguments: Sequence[str], given: Path, output: Path, errors: Path
) -> None:
    for stream, path in ((1, output), (2, errors)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream)
    sys.stdin = open(given)  # noqa: SIM115 (until the process ends)
    sys.argv = ["petals-lightning", *arguments]
    program()


def _run(program: Callable[[], None], arguments: Sequence[str], output: connection.Connection) -> None:
    """Does what an executable does with a command line, with `output` as its stdout and stderr."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.argv = ["petals-lightning", *arguments]
    program()
