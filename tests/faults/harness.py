"""Faults × phases: what they cost, and that training ends as if they had not been.

Two servers hold all blocks, as processes, each behind a TCP proxy whose address is the only one that others know. The
one in use is struck; a short training run goes on, and its losses and gradients are compared with those of float64.
"""

from __future__ import annotations

import math
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
from petals_lightning.models import AutoDistributedModelForSequenceClassification, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.strategies.server_process import ServerProcess
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import HEAVIER_BLOCKS
from tools.testing.proxy import SharedLink, TcpProxy, free_port
from tools.testing.servers import start_server
from tools.testing.swarms import LOOPBACK, PREFIX, serve_options

STEPS, STRUCK_STEP, BATCH = 4, 1, 32
PHASES = ("connect", "forward", "backward", "between", "validation")
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 4, "num_labels": 2}


@dataclass
class Holder:
    """A server of all blocks behind its proxy, whose connections share the link."""

    process: ServerProcess
    proxy: TcpProxy
    link: SharedLink
    stop_slowness: threading.Event


class FaultySwarm:
    """Two holders and a bootstrap peer; `heal` makes them whole again between cases."""

    def __init__(self, checkpoint: Path, servers: str = "ours"):
        self._checkpoint, self._kind = checkpoint, servers
        self.bootstrap = SwarmNode(host_maddrs=LOOPBACK).start()
        self.holders: list[Holder] = []

    def __enter__(self) -> FaultySwarm:
        for holder in [self._start(0), self._start(1)]:
            holder.process.wait_until_ready()
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
        router, prefix = blocks._swarm.router, OPTIONS["pre_seq_len"]
        size = router.microbatch_size(blocks.route(), samples, tokens, prefix)
        peer = blocks.route(size * tokens)[0].peer_id
        holders = {holder.process.peer_id: holder for holder in self.holders}
        if peer not in holders:  # killed in a case before, and its record stands: it would be tried in vain
            ended = [other for other in blocks._swarm.servers.spans if other not in holders]
            route = router.other_route(0, HEAVIER_BLOCKS, tokens=size * tokens, avoid=ended)
            assert route is not None
            peer = route[0].peer_id
        return holders[peer]

    def heal(self) -> None:
        for number, holder in enumerate(self.holders):
            holder.stop_slowness.set()
            holder.proxy.heal()
            holder.link.rate = math.inf
            if holder.process.is_alive:
                holder.process.signal(signal.SIGCONT)
            else:
                holder.process.stop()
                holder.proxy.close()
                self.holders[number] = self._start(number)
                self.holders[number].process.wait_until_ready()

    def _start(self, number: int) -> Holder:
        port = free_port()
        proxy = TcpProxy(port)
        proxy.link = link = SharedLink(math.inf)
        process = start_server(
            self._checkpoint, (0, HEAVIER_BLOCKS), self.initial_peers, "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}",
            "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{proxy.port}", "--update-period", "10",
            *serve_options(self._kind, number),
        )  # fmt: skip
        return Holder(process, proxy, link, threading.Event())


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
    "throttle 4 MB/s": lambda holder: setattr(holder.link, "rate", 4e6),
    "10 × slower": slow_down,
}
LIMITS = {"kill": 1.0, "hang": 10.0, "black hole": 10.0, "cut": 10.0}


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(1, 96, (BATCH, 80), generator=generator)
    return {"input_ids": input_ids, "labels": torch.randint(0, 2, (BATCH,), generator=generator)}


def mean_loss(model: Any, whole: dict[str, torch.Tensor], piece: int) -> torch.Tensor:
    """Of a batch that is given to the model in pieces of that many samples."""
    pieces = zip(*(tensor.split(piece) for tensor in whole.values()), strict=True)
    losses = [model(**dict(zip(whole, tensors, strict=True))).loss * len(tensors[0]) for tensors in pieces]
    return torch.stack(losses).sum() / BATCH


@dataclass
class Trace:
    """Of a training run: losses and gradients of each step, validation loss, seconds of each step and of loading."""

    losses: list[float]
    gradients: list[list[torch.Tensor]]
    seconds: list[float]
    validation: float
    validation_seconds: float
    loading: float = 0.0
    retries: int = 0
    hedges: int = 0

    def differs_from(self, other: Trace) -> float:
        """The largest relative difference of losses and gradients, those of deep prompts block by block."""
        pairs = [*zip(self.losses, other.losses, strict=True), (self.validation, other.validation)]
        errors = [abs(a - b) / abs(b) for a, b in pairs]
        errors += [gradient_difference(a, b) for a, b in zip(self.gradients, other.gradients, strict=True)]
        return max(errors)


def gradient_difference(gradients: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest relative difference of a matrix: of the input prompts, of the prompts of a block, of the head."""
    matrices = (-2, -1)
    pairs = zip(gradients, others, strict=True)
    return max(((a - b).norm(dim=matrices) / b.norm(dim=matrices)).max().item() for a, b in pairs)


def train(model: Any, strike: Callable[[str], None] = lambda phase: None, *, piece: int = BATCH) -> Trace:
    """A few steps and a validation; `strike` is told when a phase of the struck step begins.

    Args:
        piece: samples of each forward and backward; the model may cut its batches further.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    losses: list[float] = []
    gradients: list[list[torch.Tensor]] = []
    seconds: list[float] = []
    for step in range(STEPS):
        if step == STRUCK_STEP:
            strike("between")
        began = time.monotonic()
        optimizer.zero_grad()
        if step == STRUCK_STEP:
            strike("forward")
        loss = mean_loss(model, batch(step), piece)
        if step == STRUCK_STEP:
            strike("backward")
        loss.backward()
        seconds.append(time.monotonic() - began)
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in parameters])
        if step < STEPS - 1:
            optimizer.step()
    began = time.monotonic()
    strike("validation")
    with torch.no_grad():
        validation = model(**batch(99)).loss.item()
    validation_seconds = time.monotonic() - began
    return Trace(losses, gradients, seconds, validation, validation_seconds)


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
class Yardstick:
    """What a run is measured with. In float32 no run is right to the last bit, and no two of them are the same bit for
    bit if they cut their batches differently, as a client does when a fault has changed what it knows of its servers.

    Attributes:
        exact: the same training in float64, in one process.
        rounding: how far float32 is off it in one process, of several ways to cut the batches the one that is furthest.
        share: how far gradients are off when those of one sample are lost, of all samples the one that shows least.
    """

    exact: Trace
    rounding: float
    share: float

    @property
    def bound(self) -> float:
        """How far a run may be off: twice what another cut costs, since rounding is a matter of luck."""
        return 2 * self.rounding


def make_yardstick(swarm: FaultySwarm) -> Yardstick:
    exact = train(swarm.load_local().double())
    rounding = max(train(swarm.load_local(), piece=piece).differs_from(exact) for piece in (BATCH, 8))
    model, samples = swarm.load_local(), batch(STRUCK_STEP)
    gradients = []
    for number in range(BATCH):
        model.zero_grad()
        model(**{name: tensor[number : number + 1] for name, tensor in samples.items()}).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in prompts_of(model).parameters()])
    whole = [torch.stack(each).sum(0) for each in zip(*gradients, strict=True)]
    rests = ([all_of_them - lost for all_of_them, lost in zip(whole, own, strict=True)] for own in gradients)
    return Yardstick(exact, rounding, min(gradient_difference(rest, whole) for rest in rests))


@dataclass
class Outcome:
    """Stalls are seconds; `difference` is from the exact run."""

    fault: str
    phase: str
    stall: float
    later_stall: float
    difference: float
    retries: int
    hedges: int


def run_case(swarm: FaultySwarm, fault: str, phase: str, undisturbed: Trace, exact: Trace) -> Outcome:
    """Strikes the server in use, in one phase; compares times with `undisturbed`, a run through the same swarm."""
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
    return Outcome(fault, phase, stall, later, trace.differs_from(exact), trace.retries, trace.hedges)


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
