"""Ties children to the life of this process, even when it ends by `kill -9`.

libp2p's daemon and embedded servers outlive a parent that is killed. A guard is a tiny shell that holds the read end
of a pipe: when the parent is gone, for whatever reason, the pipe closes and the guard kills what it was told of. (The
alternative, PR_SET_PDEATHSIG, exists on Linux only and fires when the thread that started the child ends.)
"""

from __future__ import annotations

import subprocess

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
    """Kills protected processes and removes protected files if this process dies before `release`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def protect(self, pid: int, *files: str) -> None:
        """Adds a child, and files (sockets) that it leaves when killed."""
        self._tell(f"pid {pid}", *(f"file {name}" for name in files))

    def release(self) -> None:
        """Ends the guard without killing anything: the children have been stopped in order."""
        if self._process.poll() is None:
            self._tell("done")
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def _tell(self, *lines: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("".join(line + "\n" for line in lines).encode())
        self._process.stdin.flush()
