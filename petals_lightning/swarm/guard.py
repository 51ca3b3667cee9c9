"""Ends child processes with this one, even when it ends by `kill -9`.

libp2p's daemon and embedded servers outlive a parent that is killed. A guard is a small shell that holds the read end
of a pipe. When the parent ends, for any reason, the pipe closes, and the guard kills the processes that it knows. (The
alternative, PR_SET_PDEATHSIG, exists on Linux only and fires when the thread that started the child ends.)
"""

from __future__ import annotations

import subprocess
from typing import IO

_SCRIPT = """
trap '' INT TERM HUP
pids=
while read -r word value; do
  case $word in
    pid) pids="$pids $value" ;;
    file) set -- "$@" "$value" ;;
    done) exit 0 ;;
  esac
done
[ -n "$pids" ] && kill -9 $pids 2>/dev/null
[ $# -gt 0 ] && rm -f -- "$@"
"""


class ProcessGuard:
    """Kills protected processes and removes protected files if this process dies before `release`.

    `start` makes one.
    """

    def __init__(self, process: subprocess.Popen[bytes], pipe: IO[bytes]):
        self._process, self._pipe = process, pipe

    @classmethod
    def start(cls) -> ProcessGuard:
        """Starts the shell."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdin is not None  # because of PIPE
        return cls(process, process.stdin)

    def protect(self, pid: int, *files: str) -> None:
        """Adds a child, and files (sockets) that it leaves when killed."""
        self._send(f"pid {pid}", *(f"file {name}" for name in files))

    def release(self) -> None:
        """Ends the guard without killing anything. Call it after the children were stopped."""
        if self._process.poll() is None:
            self._send("done")
            self._pipe.close()
            self._process.wait()

    def _send(self, *lines: str) -> None:
        self._pipe.write("".join(line + "\n" for line in lines).encode())
        self._pipe.flush()
