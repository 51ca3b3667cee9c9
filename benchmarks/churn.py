"""A soak: servers are killed, hung, cut off and attacked at random under training, which must not notice.

    python -m benchmarks.churn --minutes 60

Four servers hold a random Llama twice: two of them all blocks, two a half each. Every few seconds one is struck, but
never so that a block is left without a holder. Now and then more happens: the peer that all join by is restarted,
three servers are cut off, or all of them are killed at once and come back (in the first half of the time). A stranger
attacks the first server all the while, each minute in another way (`tools.testing.attacks`).

At the end the same steps are trained in one local process and the traces of losses compared. Memory and file
descriptors are compared, too: the least of the second fifth of the time with the least of the last, since attacks take
memory while they last. They are the client's, and those of the first server, which is never killed alone, since it was
started last.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.swarm import PREFIX, batch_of, save_random_llama
from petals_lightning.client import ClientConfig
from petals_lightning.errors import SwarmConnectionError
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.strategies.server_process import ServerProcess
from petals_lightning.swarm import SwarmNode
from tools.testing.attacker import Attacker
from tools.testing.attacks import ATTACKS, Victim
from tools.testing.proxy import TcpProxy, free_port
from tools.testing.servers import start_server

BLOCKS, HIDDEN = 4, 128
SPANS = [(0, 4), (0, 4), (0, 2), (2, 4)]
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "num_labels": 2}

_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Servers:
    """The four servers; a thread strikes and restarts them."""

    model: str
    initial_peers: list[str]
    seed: int
    kills: int = 0
    hangs: int = 0
    cuts: int = 0
    ends: int = 0
    processes: list[ServerProcess] = field(default_factory=list)
    down: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Of whoever chooses the next servers to strike."""

    def start(self) -> None:
        self._stop, self._random = threading.Event(), random.Random(self.seed)
        self._ports = [free_port() for _ in SPANS]
        self._proxies = [TcpProxy(port) for port in self._ports]
        self.processes = [self._launch(number) for number in range(len(SPANS))]
        for process in self.processes:
            process.wait_until_ready()

    def strike_forever(self, period: float, in_use: Callable[[], set[str]]) -> None:
        """Strikes a server every `period` seconds on average, mostly one that is `in_use` (peer ids)."""
        self._thread = threading.Thread(target=self._strike, args=(period, in_use), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for process in self.processes:
            process.stop()
        for proxy in self._proxies:
            proxy.close()

    def cut_off(self, seconds: float) -> None:
        """Nobody reaches any server but the first for so long."""
        with self._all_but({0}):
            self.cuts += 1
            for proxy in self._proxies[1:]:
                proxy.black_hole()
            self._stop.wait(seconds)
            for proxy in self._proxies[1:]:
                proxy.heal()

    def end_all(self, seconds: float) -> None:
        """All are killed at once, and are back after so long."""
        with self._all_but(set()):
            self.ends += 1
            for process in self.processes:
                process.signal(signal.SIGKILL)
            for process in self.processes:
                process.stop()
            self._stop.wait(seconds)
            self.processes = [self._launch(number) for number in range(len(SPANS))]
            for process in self.processes:
                process.wait_until_ready()

    @contextmanager
    def _all_but(self, spared: set[int]) -> Iterator[None]:
        """Waits until no server is down, and marks all others as down meanwhile. No other is struck while it waits."""
        struck = set(range(len(SPANS))) - spared
        with self.turn:
            while self.down:
                time.sleep(0.1)
            with self.lock:
                self.down |= struck
        try:
            yield
        finally:
            self.down -= struck

    def _launch(self, number: int) -> ServerProcess:
        return start_server(
            self.model, SPANS[number], self.initial_peers, "--dht-prefix", PREFIX, "--update-period", "10",
            "--host-maddrs", f"/ip4/127.0.0.1/tcp/{self._ports[number]}",
            "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{self._proxies[number].port}",
            "--identity-path", f"{self.model}/server-{number}.id",
        )  # fmt: skip

    def _strike(self, period: float, in_use: Callable[[], set[str]]) -> None:
        while not self._stop.wait(self._random.uniform(0.5 * period, 1.5 * period)):
            peers = in_use()
            used = [n for n, process in enumerate(self.processes) if process.peer_id in peers]
            numbers = used if used and self._random.random() < 0.7 else list(range(len(SPANS)))
            number = self._random.choice(numbers)
            with self.turn, self.lock:
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
        self.processes[number] = self._launch(number).wait_until_ready()
        self.down.discard(number)

    def _hang(self, number: int, seconds: float) -> None:
        self.hangs += 1
        self.processes[number].signal(signal.SIGSTOP)
        self._stop.wait(seconds)
        self.processes[number].signal(signal.SIGCONT)
        self.down.discard(number)


class Bootstrap:
    """The peer that all join by, at one address and with one identity however often it is restarted.

    It has a process of its own, because it keeps what strangers store, which is not the client's memory.
    """

    def __init__(self, folder: str):
        self._options = [f"/ip4/127.0.0.1/tcp/{free_port()}"], f"{folder}/bootstrap.id"
        self._start()

    def _start(self) -> None:
        self._pipe, pipe = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_be_bootstrap, args=(*self._options, pipe), daemon=True)
        self._process.start()
        pipe.close()
        self.maddrs: list[str] = self._pipe.recv()

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _be_bootstrap(maddrs: list[str], identity: str, pipe: Connection) -> None:
    """The bootstrap peer's process; it ends when the other end of the pipe is closed."""
    node = SwarmNode(host_maddrs=maddrs, identity_path=identity).start()
    try:
        pipe.send(node.visible_maddrs())
        pipe.poll(None)
    finally:
        node.close()


def disturb(servers: Servers, bootstrap: Bootstrap, seconds: float, stop: threading.Event) -> None:
    """What happens more seldom than a strike: one such thing every minute."""
    began, chance = time.monotonic(), random.Random(servers.seed)
    while not stop.wait(chance.uniform(40, 80)):
        is_early = time.monotonic() - began < seconds / 2
        kinds = ["bootstrap", "cut", "end"] if is_early else ["bootstrap", "cut"]
        match chance.choice(kinds):
            case "bootstrap":
                bootstrap.restart()
            case "cut":
                servers.cut_off(chance.uniform(5, 20))
            case "end":
                servers.end_all(chance.uniform(1, 10))


def attack_forever(victim: Victim, seed: int) -> None:
    """The stranger's process: another attack every minute, each with peers of its own."""
    os.nice(19)
    chance = random.Random(seed)
    while True:
        name = chance.choice(sorted(ATTACKS))
        identities, begin = ATTACKS[name]
        attackers: list[Attacker] = []
        try:
            attackers += [Attacker(victim) for _ in range(min(identities, 4))]
            again, end = begin(victim, attackers), time.monotonic() + 60
            while time.monotonic() < end:
                again()
                time.sleep(0.05)
        except (OSError, TimeoutError, AssertionError, SwarmConnectionError) as e:  # the server is away, or ends it
            print(f"stranger: {name}: {e!r:.120}", flush=True)
            time.sleep(5)
        finally:
            for attacker in attackers:
                attacker.close()


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


def least(footprints: list[tuple[float, int]]) -> tuple[float, int]:
    """The least memory, and the least number of descriptors."""
    return min(memory for memory, _ in footprints), min(descriptors for _, descriptors in footprints)


def written(client: list[tuple[float, int]], first: FirstServer) -> str:
    """Memory and descriptors now."""
    now = {"client": client[-1], "server": (first.footprints or [(0.0, 0)])[-1]}
    return ", ".join(f"{name} {memory:.0f} MiB, {count} descriptors" for name, (memory, count) in now.items())


class FirstServer:
    """The first server's footprints, since it was started last."""

    def __init__(self, servers: Servers):
        self._servers, self._pid = servers, servers.processes[0].pid
        self.footprints = [footprint(self._pid)]

    def look(self) -> None:
        with self._servers.lock:  # it is not killed meanwhile
            if 0 in self._servers.down:
                return
            if (pid := self._servers.processes[0].pid) != self._pid:
                self._pid, self.footprints = pid, []
            self.footprints.append(footprint(pid))


def main(
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 60.0,
    period: Annotated[float, typer.Option(help="Seconds between two strikes, on average.")] = 6.0,
    seed: int = 0,
) -> None:
    """Trains under churn, then compares with an undisturbed run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=HIDDEN, blocks=BLOCKS, dtype="float32")
        bootstrap = Bootstrap(folder)
        servers = Servers(folder, bootstrap.maddrs, seed)
        servers.start()
        torch.manual_seed(0)
        model = AutoDistributedModelForSequenceClassification.from_pretrained(
            folder, initial_peers=servers.initial_peers, dht_prefix=PREFIX,
            # Servers that were all killed are back when they have started, which takes long on a machine under load.
            client_config=ClientConfig(refresh_period=5, recovery_timeout=300), **OPTIONS,
        )  # fmt: skip
        optimizer = optimizer_of(model)
        servers.strike_forever(period, lambda: {leg.peer_id for leg in remote_blocks(model).route(256)})
        losses: list[float] = []
        seconds: list[float] = []
        stop = threading.Event()
        disturbing = threading.Thread(target=disturb, args=(servers, bootstrap, minutes * 60, stop))
        disturbing.start()
        victim = Victim(bootstrap.maddrs[0], servers.processes[0].peer_id, PREFIX, BLOCKS, HIDDEN)
        stranger = _SPAWN.Process(target=attack_forever, args=(victim, seed), daemon=True)
        stranger.start()
        client, first = [footprint(os.getpid())], FirstServer(servers)
        began = said = time.monotonic()
        try:
            while (step_began := time.monotonic()) < began + minutes * 60:
                if step_began > said + 60:
                    said = step_began
                    print(f"{(said - began) / 60:.0f} min: {len(losses)} steps, {written(client, first)}", flush=True)
                losses.append(train_step(model, optimizer, len(losses)))
                seconds.append(time.monotonic() - step_began)
                client.append(footprint(os.getpid()))
                first.look()
        finally:
            stop.set()
            disturbing.join()
            stranger.kill()
            servers.stop()
        stats = remote_blocks(model).stats
        remote_blocks(model).close()
        bootstrap.close()
        torch.manual_seed(0)
        local = LocalModelForSequenceClassification.from_pretrained(folder, **OPTIONS)
        optimizer = optimizer_of(local)
        undisturbed = [train_step(local, optimizer, step) for step in range(len(losses))]
    off = max(abs(got - expected) / abs(expected) for got, expected in zip(losses, undisturbed, strict=True))
    print(f"{len(losses)} steps in {minutes:g} min, none lost; {servers.kills} kills, {servers.hangs} hangs, ", end="")
    print(f"{servers.cuts} times three cut off, {servers.ends} times all killed")
    print(f"retries {stats.retries}, hedges {stats.hedges}")
    print(f"step: median {statistics.median(seconds):.3f} s, longest {max(seconds):.2f} s")
    print(f"largest relative difference of a loss from the undisturbed run: {off:.1e}")
    for name, footprints in (("client", client), ("server", first.footprints)):
        fifth = len(footprints) // 5
        (memory, descriptors), (later, later_descriptors) = (
            least(footprints[fifth : 2 * fifth]),
            least(footprints[-fifth:]),
        )
        print(f"{name}: {memory:.0f} -> {later:.0f} MiB, {descriptors} -> {later_descriptors} file descriptors")
    if off > 1e-4:
        raise SystemExit("the run did not end as if undisturbed")


if __name__ == "__main__":
    typer.run(main)
