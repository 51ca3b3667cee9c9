"""A soak: servers are killed, hung and restarted at random under training, which must not notice.

    python -m benchmarks.churn --minutes 20

Four servers hold a random Llama twice: two of them all blocks, two a half each. Every few seconds one is struck, but
never so that a block is left without a holder. At the end the same steps are trained in one local process and the
traces of losses compared; memory and file descriptors of the client and of the server that is never killed are
compared between the first fifth of the time and the end.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.swarm import PREFIX, batch_of, save_random_llama
from petals_lightning.client import ClientConfig
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.swarm import SwarmNode
from tests.swarms import LOOPBACK, ServerProcess

BLOCKS = 4
SPANS = [(0, 4), (0, 4), (0, 2), (2, 4)]
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "num_labels": 2}


@dataclass
class Servers:
    """The four servers; a thread strikes and restarts them."""

    model: str
    initial_peers: list[str]
    seed: int
    kills: int = 0
    hangs: int = 0
    processes: list[ServerProcess] = field(default_factory=list)
    down: set[int] = field(default_factory=set)

    def start(self) -> None:
        self._stop, self._random = threading.Event(), random.Random(self.seed)
        self.processes = [self._launch(number) for number in range(len(SPANS))]
        for process in self.processes:
            process.wait_ready()

    def strike_forever(self, period: float, in_use: Callable[[], set[str]]) -> None:
        """Strikes a server every `period` seconds on average, mostly one that is `in_use` (peer ids)."""
        self._thread = threading.Thread(target=self._strike, args=(period, in_use), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for process in self.processes:
            process.stop()

    def _launch(self, number: int) -> ServerProcess:
        return ServerProcess(
            self.model, SPANS[number], self.initial_peers, "--dht-prefix", PREFIX, "--update-period", "10"
        )

    def _strike(self, period: float, in_use: Callable[[], set[str]]) -> None:
        while not self._stop.wait(self._random.uniform(0.5 * period, 1.5 * period)):
            peers = in_use()
            used = [n for n, process in enumerate(self.processes) if process.peer_id in peers]
            numbers = used if used and self._random.random() < 0.7 else list(range(len(SPANS)))
            number = self._random.choice(numbers)
            rest = set(range(len(SPANS))) - self.down - {number}
            if number in self.down or not (rest & {0, 1} or {2, 3} <= rest):
                continue
            self.down.add(number)
            # The first is hung only, and so lives long enough for its memory to be watched.
            strike = self._hang if number == 0 or self._random.random() < 0.3 else self._kill
            threading.Thread(target=strike, args=(number, self._random.uniform(1, 10)), daemon=True).start()
        while self.down:
            time.sleep(0.1)

    def _kill(self, number: int, seconds: float) -> None:
        self.kills += 1
        self.processes[number].signal(signal.SIGKILL)
        self.processes[number].stop()
        self._stop.wait(seconds)
        self.processes[number] = self._launch(number).wait_ready()
        self.down.discard(number)

    def _hang(self, number: int, seconds: float) -> None:
        self.hangs += 1
        self.processes[number].signal(signal.SIGSTOP)
        self._stop.wait(seconds)
        self.processes[number].signal(signal.SIGCONT)
        self.down.discard(number)


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(step)
        batch = batch_of(8, 32)
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    # SGD: Adam divides by the gradient's size, and so would turn differences in rounding into differences of steps.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def footprint(pid: int) -> tuple[float, int]:
    """MiB resident, and open file descriptors."""
    process = psutil.Process(pid)
    return process.memory_info().rss / 2**20, process.num_fds()


def main(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 20.0,
    period: Annotated[float, typer.Option(help="Seconds between two strikes, on average.")] = 6.0,
    seed: int = 0,
) -> None:
    """Trains under churn, then compares with an undisturbed run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=128, blocks=BLOCKS, dtype="float32")
        bootstrap = SwarmNode(host_maddrs=LOOPBACK).start()
        servers = Servers(folder, bootstrap.visible_maddrs(), seed)
        servers.start()
        torch.manual_seed(0)
        model = AutoDistributedModelForSequenceClassification.from_pretrained(
            folder, initial_peers=servers.initial_peers, dht_prefix=PREFIX,
            client_config=ClientConfig(refresh_period=5), **OPTIONS,
        )  # fmt: skip
        optimizer = optimizer_of(model)
        servers.strike_forever(period, lambda: {leg.peer_id for leg in remote_blocks(model).route(256)})
        losses: list[float] = []
        seconds: list[float] = []
        early = None
        began = time.monotonic()
        try:
            while (elapsed := time.monotonic() - began) < minutes * 60:
                if early is None and elapsed > minutes * 12:
                    early = footprint(os.getpid()), footprint(servers.processes[0].pid)
                step_began = time.monotonic()
                losses.append(train_step(model, optimizer, len(losses)))
                seconds.append(time.monotonic() - step_began)
            late = footprint(os.getpid()), footprint(servers.processes[0].pid)
        finally:
            servers.stop()
        stats = remote_blocks(model).stats
        remote_blocks(model).close()
        bootstrap.close()
        torch.manual_seed(0)
        local = LocalModelForSequenceClassification.from_pretrained(folder, **OPTIONS)
        optimizer = optimizer_of(local)
        undisturbed = [train_step(local, optimizer, step) for step in range(len(losses))]
    off = max(abs(got - expected) / abs(expected) for got, expected in zip(losses, undisturbed, strict=True))
    assert early is not None
    print(f"{len(losses)} steps in {minutes:g} min, none lost; {servers.kills} kills, {servers.hangs} hangs")
    print(f"retries {stats.retries}, hedges {stats.hedges}")
    print(f"step: median {statistics.median(seconds):.3f} s, longest {max(seconds):.2f} s")
    print(f"largest relative difference of a loss from the undisturbed run: {off:.1e}")
    for name, (memory, descriptors), (later, later_descriptors) in zip(("client", "server"), early, late, strict=True):
        print(f"{name}: {memory:.0f} -> {later:.0f} MiB, {descriptors} -> {later_descriptors} file descriptors")
    if off > 1e-4:
        raise SystemExit("the run did not end as if undisturbed")


if __name__ == "__main__":
    typer.run(main)
