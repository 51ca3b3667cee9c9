"""A client in a process of its own, which trains when told to.

`Client` starts it; the process itself reads times from its standard input, trains until then, and answers each with the
steps it made and the most memory it has had.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
import typer

from benchmarks.options import parse_case
from benchmarks.swarm import batch_of, classifier, optimizer_of, peak_memory, run_step
from petals_lightning.models import remote_blocks


class Client:
    """The process, from outside.

    Args:
        folder, maddr: the model, and an address in its swarm.
        case: batch×tokens×P of its steps.
        tuning_mode: of its prompts.
    """

    def __init__(self, folder: str, maddr: str, case: str, tuning_mode: str = "deep_ptune"):
        command = [sys.executable, "-m", "benchmarks.training_client", folder, maddr, case, tuning_mode]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def wait_until_ready(self) -> None:
        """Returns when it has made its first steps."""
        if (line := self._stdout.readline()) != "ready\n":
            raise RuntimeError(f"a client did not start: it says {line!r}")

    def start(self, until: float) -> None:
        """Trains until this `time.time()`; ask for `done` then."""
        self._stdin.write(f"{until}\n")
        self._stdin.flush()

    def done(self) -> tuple[float, int]:
        """Steps made in that time, with the part of the last one that fell into it, and the peak of memory in bytes."""
        steps, peak = self._stdout.readline().split()
        return float(steps), int(peak)

    def close(self) -> None:
        self._stdin.close()
        self._process.wait()
        self._stdout.close()


def train(folder: str, maddr: str, case: str, tuning_mode: str) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    batch_size, tokens, pre_seq_len = parse_case(case)
    model = classifier(folder, maddr, pre_seq_len, tuning_mode=tuning_mode)
    optimizer, batch = optimizer_of(model), batch_of(batch_size, tokens)
    for _ in range(2):
        run_step(model, optimizer, batch)
    print("ready", flush=True)
    for line in sys.stdin:
        until, steps = float(line), 0.0
        while (began := time.time()) < until:
            run_step(model, optimizer, batch)
            steps += min(1.0, (until - began) / (time.time() - began))
        print(steps, peak_memory(os.getpid()), flush=True)
    remote_blocks(model).close()


if __name__ == "__main__":
    typer.run(train)
