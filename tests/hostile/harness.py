"""An honest server, a trainer, and beside them an attacker: what the attack costs the two, and newcomers."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from petals_lightning.client import ClientConfig
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.swarm import record_keeping
from tests.helpers.families import HEAVIER_BLOCKS, HEAVIER_HIDDEN
from tests.hostile.servers import CACHE, GRAPHS, REQUESTS, SERVERS, honest
from tools.testing.attacker import Attacker, resident
from tools.testing.attacks import ATTACKS, Victim
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX
from tools.testing.tensors import relative_error

MIB = 1 << 20
SECONDS = 6.0  # for which speed is measured, without the attack and with it
LEAST_SHARE = 0.4  # of the lone speed
LONGEST_STEP = 20.0  # seconds; a queue that does not move is waited for 15, a server that is silent for ten
SERVER_BUDGET = REQUESTS + GRAPHS + CACHE + 2 * record_keeping.MAX_BYTES + 128 * MIB  # the last for what it works with
CLIENT_BUDGET = 256 * MIB
ROUNDING = 1e-4  # of float32: losses and gradients may differ by so much from those of one process

BATCH = {"input_ids": torch.arange(1, 16 * 64 + 1).remainder(95).add(1).view(16, 64), "labels": torch.arange(16) % 2}
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "num_labels": 2}

_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Outcome:
    """What an attack did.

    Attributes:
        share: steps a second with the attack, of those without.
        longest: seconds of the longest step.
        difference: of losses and gradients from those of one process, relative, the largest.
        newcomer: seconds until another client had loaded the model and made its first step.
        server, client: MiB that their processes have grown by.
        retries: of both clients.
    """

    share: float
    longest: float
    difference: float
    newcomer: float
    server: float
    client: float
    retries: int

    def broken_promises(self, *, is_server: bool) -> list[str]:
        """In words. With a hostile server in the route the first steps are lost to it; then speed is as before."""
        limits = {
            f"a share of {self.share:.2f}": self.share < LEAST_SHARE and not is_server,
            f"a step of {self.longest:.0f} s": self.longest > LONGEST_STEP,
            f"gradients {self.difference:.0e} off": not self.difference < ROUNDING,
            f"{self.newcomer:.0f} s to join": self.newcomer > 2 * LONGEST_STEP,
            f"{self.server:.0f} MiB of the server": self.server * MIB > 1.1 * SERVER_BUDGET,
            f"{self.client:.0f} MiB of the client": self.client * MIB > 1.1 * CLIENT_BUDGET,
        }
        return [words for words, is_broken in limits.items() if is_broken]


class Arena:
    """One honest server of all blocks, and the results of one process to compare with."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self.server = start_server(checkpoint, None, program=honest).wait_until_ready()
        torch.manual_seed(0)
        local = LocalModelForSequenceClassification.from_pretrained(str(checkpoint), **OPTIONS)
        self._expected = _step(local)

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.stop()

    def run(self, attack: str, alone_seconds: float = SECONDS) -> Outcome:
        """Trains alone for so long, then beside the attack."""
        before, own = resident(self.server.pid), resident(os.getpid())
        model = self._load()
        try:
            alone, _, _ = self._train(model, alone_seconds)
            with self._attacked(attack):
                rate, longest, difference = self._train(model)
                began = time.monotonic()
                newcomer = self._load()
                try:
                    difference = max(difference, self._difference(_step(newcomer)))
                    joined = time.monotonic() - began
                    retries = remote_blocks(newcomer).stats.retries + remote_blocks(model).stats.retries
                finally:
                    remote_blocks(newcomer).close()
                server, client = resident(self.server.pid) - before, resident(os.getpid()) - own
        finally:
            remote_blocks(model).close()
        return Outcome(rate / alone, longest, difference, joined, server / MIB, client / MIB, retries)

    def _load(self) -> Any:
        torch.manual_seed(0)
        return AutoDistributedModelForSequenceClassification.from_pretrained(
            str(self._checkpoint), initial_peers=[self.server.maddr], dht_prefix=PREFIX,
            client_config=ClientConfig(refresh_period=1.0), **OPTIONS,
        )  # fmt: skip

    def _train(self, model: Any, lasting: float = SECONDS) -> tuple[float, float, float]:
        """Steps a second, the longest step's seconds, and the largest difference."""
        seconds, differences = [], []
        end = time.monotonic() + lasting
        while time.monotonic() < end:
            began = time.monotonic()
            differences.append(self._difference(_step(model)))
            seconds.append(time.monotonic() - began)
        return len(seconds) / sum(seconds), max(seconds), max(differences)

    def _difference(self, found: list[torch.Tensor]) -> float:
        pairs = zip(found, self._expected, strict=True)
        return max(relative_error(a, b) for a, b in pairs)

    @contextmanager
    def _attacked(self, attack: str) -> Iterator[None]:
        with ExitStack() as stack:
            if attack in SERVERS:
                process = start_server(self._checkpoint, None, [self.server.maddr], program=SERVERS[attack])
                stack.callback(process.stop)
                process.wait_until_ready()
                time.sleep(2.0)  # the trainer has looked at the records since
            else:
                ready, stop = _SPAWN.Event(), _SPAWN.Event()
                victim = Victim(self.server.maddr, self.server.peer_id, PREFIX, HEAVIER_BLOCKS, HEAVIER_HIDDEN)
                attacker = _SPAWN.Process(target=_attack, args=(attack, victim, ready, stop), daemon=True)
                attacker.start()
                stack.callback(_end, attacker, stop)
                if not ready.wait(120):
                    raise RuntimeError(f"the attack {attack!r} has not begun")
            yield


def _step(model: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.requires_grad)]


def _attack(name: str, victim: Victim, ready: Event, stop: Event) -> None:
    """The attacker's process. An attacker has a machine of its own: here it takes what the others leave."""
    os.nice(19)
    identities, begin = ATTACKS[name]
    attackers = [Attacker(victim) for _ in range(identities)]
    again = begin(victim, attackers)
    _unless_refused(again)
    ready.set()
    while not stop.is_set():
        _unless_refused(again)
        time.sleep(0.01)
    for attacker in attackers:
        attacker.close()


def _unless_refused(act: Callable[[], None]) -> None:
    try:
        act()
    except (OSError, TimeoutError, AssertionError) as e:  # the server may end the attacker's streams
        print(f"attacker: {e!r:.200}", flush=True)


def _end(attacker: Any, stop: Event) -> None:
    stop.set()
    attacker.join(20)
    attacker.kill()
    attacker.join()
