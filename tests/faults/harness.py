"""Faults × phases: what they cost, and that training ends as if they had not been.

Two servers hold all blocks, as processes, each behind a TCP proxy whose address is the only one that others know. The
one in use is struck; a short training run goes on and its losses and gradients are compared with an undisturbed one.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from petals_lightning.client import ClientConfig
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.swarm import SwarmNode
from tests.families import HEAVIER_BLOCKS
from tests.faults.proxy import TcpProxy, free_port
from tests.swarms import LOOPBACK, PREFIX, ServerProcess, serve_options

STEPS, STRUCK_STEP = 4, 1
PHASES = ("connect", "forward", "backward", "between", "validation")
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "num_labels": 2}


@dataclass
class Holder:
    """A server of all blocks behind its proxy."""

    process: ServerProcess
    proxy: TcpProxy
    stop_slowness: threading.Event


class FaultySwarm:
    """Two holders and a bootstrap peer; `heal` makes them whole again between cases."""

    def __init__(self, checkpoint: Path, servers: str = "ours"):
        self._checkpoint, self._kind = checkpoint, servers
        self.bootstrap = SwarmNode(host_maddrs=LOOPBACK).start()
        self.holders: list[Holder] = []

    def __enter__(self) -> FaultySwarm:
        for holder in [self._start(0), self._start(1)]:
            holder.process.wait_ready()
            self.holders.append(holder)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for holder in self.holders:
            holder.stop_slowness.set()
            holder.process.stop()
            holder.proxy.close()
        self.bootstrap.close()

    @property
    def initial_peers(self) -> list[str]:
        return self.bootstrap.visible_maddrs()

    def load(self) -> Any:
        torch.manual_seed(0)
        return AutoDistributedModelForSequenceClassification.from_pretrained(
            str(self._checkpoint), initial_peers=self.initial_peers, dht_prefix=PREFIX,
            client_config=ClientConfig(refresh_period=5), **OPTIONS,
        )  # fmt: skip

    def load_local(self) -> Any:
        torch.manual_seed(0)
        return LocalModelForSequenceClassification.from_pretrained(str(self._checkpoint), **OPTIONS)

    def in_use(self, model: Any) -> Holder:
        """Whose turn it is with the next micro-batch; servers of different kinds are best at different sizes."""
        blocks, (samples, tokens) = remote_blocks(model), batch(0)["input_ids"].shape
        view, prefix = blocks._swarm.view, OPTIONS["pre_seq_len"]
        size = view.microbatch_size(blocks.route(), samples, tokens, prefix, deep=True)
        peer = blocks.route(size * tokens)[0].peer_id
        holders = {holder.process.peer_id: holder for holder in self.holders}
        if peer not in holders:  # killed in a case before, and its record stands: it would be tried in vain
            ended = [other for other in view._spans if other not in holders]
            peer = view.other_route(0, HEAVIER_BLOCKS, tokens=size * tokens, avoid=ended)[0].peer_id
        return holders[peer]

    def heal(self) -> None:
        for number, holder in enumerate(self.holders):
            holder.stop_slowness.set()
            holder.proxy.heal()
            if holder.process.process.is_alive():
                holder.process.signal(signal.SIGCONT)
            else:
                holder.process.stop()
                holder.proxy.close()
                self.holders[number] = self._start(number)
                self.holders[number].process.wait_ready()

    def _start(self, number: int) -> Holder:
        port = free_port()
        proxy = TcpProxy(port)
        process = ServerProcess(
            self._checkpoint, (0, HEAVIER_BLOCKS), self.initial_peers, "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}",
            "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{proxy.port}", "--update-period", "10",
            *serve_options(self._kind, number),
        )  # fmt: skip
        return Holder(process, proxy, threading.Event())


def slow_down(holder: Holder, factor: int = 10, period: float = 0.1) -> None:
    """The server runs for one `factor`-th of the time, until it is healed."""
    holder.stop_slowness = stop = threading.Event()

    def alternate() -> None:
        with suppress(ProcessLookupError):
            while not stop.is_set():
                holder.process.signal(signal.SIGSTOP)
                stop.wait(period * (factor - 1) / factor)
                holder.process.signal(signal.SIGCONT)
                stop.wait(period / factor)

    threading.Thread(target=alternate, daemon=True).start()


FAULTS: dict[str, Callable[[Holder], None]] = {
    "kill": lambda holder: holder.process.signal(signal.SIGKILL),
    "hang": lambda holder: holder.process.signal(signal.SIGSTOP),
    "black hole": lambda holder: holder.proxy.black_hole(),
    "cut": lambda holder: holder.proxy.cut(),
    "delay 0.2 s": lambda holder: setattr(holder.proxy, "delay", 0.2),
    "throttle 4 MB/s": lambda holder: setattr(holder.proxy, "rate", 4e6),
    "10 × slower": slow_down,
}
BOUNDS = {"ours": 1e-5, "petals": 1e-5, "mixed": 2e-5}
"""How far a run with a fault may be off the undisturbed one. Servers of the two kinds compute the prefix in different
forms (1.0e-5 off a local run without any fault), and a fault moves work from one to the other."""
LIMITS = {"kill": 1.0, "hang": 10.0, "black hole": 10.0, "cut": 10.0}


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(1, 96, (32, 80), generator=generator)
    return {"input_ids": input_ids, "labels": torch.randint(0, 2, (32,), generator=generator)}


@dataclass
class Trace:
    """Of a training run: losses, gradients of the last step, validation loss, seconds of each step and of loading."""

    losses: list[float]
    gradients: list[torch.Tensor]
    seconds: list[float]
    validation: float
    validation_seconds: float
    loading: float = 0.0
    retries: int = 0
    hedges: int = 0

    def differs_from(self, other: Trace) -> float:
        """The largest relative difference of losses and gradients."""
        pairs = [*zip(self.losses, other.losses, strict=True), (self.validation, other.validation)]
        errors = [abs(a - b) / abs(b) for a, b in pairs]
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip(self.gradients, other.gradients, strict=True)]
        return max(errors)


def train(model: Any, strike: Callable[[str], None] = lambda phase: None) -> Trace:
    """A few steps and a validation; `strike` is told when a phase of the struck step begins."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    losses, seconds = [], []
    for step in range(STEPS):
        if step == STRUCK_STEP:
            strike("between")
        began = time.monotonic()
        optimizer.zero_grad()
        if step == STRUCK_STEP:
            strike("forward")
        loss = model(**batch(step)).loss
        if step == STRUCK_STEP:
            strike("backward")
        loss.backward()
        seconds.append(time.monotonic() - began)
        losses.append(loss.item())
        if step < STEPS - 1:
            optimizer.step()
    began = time.monotonic()
    strike("validation")
    with torch.no_grad():
        validation = model(**batch(99)).loss.item()
    validation_seconds = time.monotonic() - began
    return Trace(losses, [p.grad.clone() for p in parameters], seconds, validation, validation_seconds)


def train_remotely(swarm: FaultySwarm, strike: Callable[[str, Any], None] = lambda phase, model: None) -> Trace:
    began = time.monotonic()
    model = swarm.load()
    loading = time.monotonic() - began
    try:
        trace = train(model, lambda phase: strike(phase, model))
        trace.loading, stats = loading, remote_blocks(model).stats
        trace.retries, trace.hedges = stats.retries, stats.hedges
        return trace
    finally:
        remote_blocks(model).close()


@dataclass
class Outcome:
    fault: str
    phase: str
    stall: float
    later_stall: float
    difference: float
    retries: int
    hedges: int


def run_case(swarm: FaultySwarm, fault: str, phase: str, undisturbed: Trace) -> Outcome:
    """Strikes the server in use, in one phase; compares with a run through the same swarm without a fault."""
    timers: list[threading.Timer] = []

    def strike(now: str, model: Any) -> None:
        if now != phase:
            return
        victim = swarm.in_use(model)
        if phase == "between":
            FAULTS[fault](victim)
        else:
            timers.append(threading.Timer(0.1, FAULTS[fault], [victim]))
            timers[-1].start()

    try:
        if phase == "connect":
            model = swarm.load()
            victim = swarm.in_use(model)
            remote_blocks(model).close()
            FAULTS[fault](victim)
        trace = train_remotely(swarm, strike)
        for timer in timers:
            timer.join()
    finally:
        swarm.heal()
    step = statistics.median(undisturbed.seconds[1:])
    stalls = {
        "connect": trace.loading - undisturbed.loading,
        "validation": trace.validation_seconds - undisturbed.validation_seconds,
    }
    stall = stalls.get(phase, trace.seconds[STRUCK_STEP] - step)
    later = max(seconds - step for seconds in trace.seconds[STRUCK_STEP + 1 :])
    return Outcome(fault, phase, stall, later, trace.differs_from(undisturbed), trace.retries, trace.hedges)


def steps_until_recovery(swarm: FaultySwarm, steps: int = 25) -> tuple[int, float, float]:
    """The server in use becomes 10 × slower.

    Returns:
        The step after which steps are within 1.5 × of their usual time, that time, and the longest step's.
    """
    model = swarm.load()

    def step(number: int) -> float:
        began = time.monotonic()
        model(**batch(number)).loss.backward()
        return time.monotonic() - began

    try:
        step(0)
        usual = statistics.median(step(number) for number in range(4))
        slow_down(swarm.in_use(model))
        seconds = [step(number) for number in range(steps)]
        slow = [number for number, taken in enumerate(seconds, 1) if taken > 1.5 * usual + 0.1]
        isolated = [number for number in slow if number > 1 and number - 1 not in slow]  # this machine's own noise
        return max((n for n in slow if n not in isolated), default=0), usual, max(seconds)
    finally:
        swarm.heal()
        remote_blocks(model).close()
