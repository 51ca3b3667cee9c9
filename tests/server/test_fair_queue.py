"""Two clients share one server: whoever asks for more does not get more than half."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.server.access.limits import ServerLimits, room_for
from petals_lightning.server.access.quotas import ClientUsage, Quotas
from petals_lightning.server.execution.fair_queue import FairQueue
from tests.helpers.clocks import Clock
from tests.helpers.families import HIDDEN, NUM_BLOCKS

DECODE, BACKWARD, FORWARD, PREFILL = 0, 1, 2, 3


def drain(queue: FairQueue, seconds: dict[str, float], count: int = 10**6) -> str:
    """The items that run, each charged what its client's take."""
    order = ""
    while count and (ticket := queue.pop()) is not None:
        order += ticket.item
        queue.charge(ticket, seconds[ticket.client])
        count -= 1
    return order


def test_clients_take_turns_by_seconds_used():
    queue: FairQueue[str] = FairQueue()
    for _ in range(6):
        queue.put("a", FORWARD, "a")
    for _ in range(3):
        queue.put("b", FORWARD, "b")
    assert drain(queue, {"a": 1.0, "b": 1.0}) == "abababaaa"


def test_a_client_with_large_requests_gets_fewer():
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.put("large", FORWARD, "L")
        queue.put("small", FORWARD, "s")
    assert drain(queue, {"large": 4.0, "small": 1.0}, 25).count("s") == 20


def test_idle_time_is_not_saved_up():
    queue: FairQueue[str] = FairQueue()
    for _ in range(10):
        queue.put("a", FORWARD, "a")
    drain(queue, {"a": 1.0}, 5)
    for _ in range(5):
        queue.put("b", FORWARD, "b")
    assert drain(queue, {"a": 1.0, "b": 1.0}) in ("bababababa", "ababababab", "bbabababaa", "bababababa")


def test_decode_goes_first_and_backward_before_forward_of_one_client():
    queue: FairQueue[str] = FairQueue()
    queue.put("b", FORWARD, "f")
    drain(queue, {"b": 100.0})
    queue.put("a", FORWARD, "f")
    queue.put("a", BACKWARD, "b")
    queue.put("b", FORWARD, "F")
    queue.put("b", DECODE, "D")
    assert drain(queue, {"a": 1.0, "b": 1.0}) == "DbfF"


def test_short_steps_go_first_only_while_their_client_is_not_ahead():
    queue: FairQueue[str] = FairQueue(Clock())
    for _ in range(9):
        queue.put("talker", DECODE, "D")
    for _ in range(3):
        queue.put("trainer", FORWARD, "F")
    assert drain(queue, {"talker": 1.0, "trainer": 3.0}) == "DFDDDFDDDFDD"


def test_short_steps_beside_several_trainers_wait_for_what_runs_alone():
    """What one talker uses beside trainers is far less than its share: no step waits for more than what runs."""
    clock = Clock()
    queue: FairQueue[str] = FairQueue(clock)
    for number in range(4):
        queue.put(f"trainer {number}", FORWARD, "F")
    order = ""
    for _ in range(40):
        running = queue.pop()
        assert running is not None
        order += running.item
        queue.put("talker", DECODE, "D")
        clock.now += 0.1
        queue.charge(running, 0.1)
        queue.put(running.client, FORWARD, "F")
        step = queue.pop()
        assert step is not None
        order += step.item
        queue.charge(step, 0.005)
    assert order == "FD" * 40


def test_a_long_step_does_not_make_the_short_ones_after_it_wait():
    queue: FairQueue[str] = FairQueue(Clock())
    for name in ("a", "b"):
        queue.put(name, FORWARD, "F")
    queue.put("talker", PREFILL, "P")
    order = drain(queue, {"a": 0.1, "b": 0.1, "talker": 2.0}, 3)
    for name in ("a", "b"):
        for _ in range(2):
            queue.put(name, FORWARD, "F")
    queue.put("talker", DECODE, "D")
    queue.put("talker", PREFILL, "P")
    assert order + drain(queue, {"a": 0.1, "b": 0.1, "talker": 0.01}) == "FFPDFFFFP"


def test_a_long_step_is_held_for_one_that_is_behind_and_was_just_answered():
    clock = Clock()
    queue: FairQueue[str] = FairQueue(clock)

    def take(seconds: float) -> str:
        ticket = queue.pop()
        assert ticket is not None
        clock.now += seconds
        queue.charge(ticket, seconds)
        return ticket.item

    for _ in range(3):
        queue.put("greedy", PREFILL, "P")
    assert queue.hold() == 0.0, "nobody else is here"
    assert take(1.0) == "P"
    for _ in range(4):
        queue.put("trainer", FORWARD, "F")
        assert queue.hold() == 0.0
        assert take(0.01) == "F"
        assert queue.hold() == pytest.approx(0.1), "it may come again at once"
        clock.now += 0.05
        assert queue.hold() == pytest.approx(0.05)
    clock.now += 0.06
    assert queue.hold() == 0.0, "it is away"
    assert take(1.0) == "P"
    queue.put("trainer", FORWARD, "F")
    assert take(0.01) == "F"


def test_time_that_is_held_free_for_a_client_counts_as_its_own():
    """A trainer that keeps the server waiting has half of it: the waiting, too."""
    clock = Clock()
    queue: FairQueue[str] = FairQueue(clock)
    used = {"greedy": 0.0, "trainer": 0.0}
    comes_at = 0.0
    queue.put("greedy", PREFILL, "P")
    while clock.now < 60:
        if comes_at <= clock.now:
            queue.put("trainer", FORWARD, "F")
            comes_at = float("inf")
        if (held := queue.hold()) > 0:
            clock.now = min(clock.now + held, max(comes_at, clock.now))
            continue
        ticket = queue.pop()
        assert ticket is not None
        seconds = {"greedy": 0.3, "trainer": 0.02}[ticket.client]
        clock.now += seconds
        used[ticket.client] += seconds
        queue.charge(ticket, seconds)
        if ticket.client == "greedy":
            queue.put("greedy", PREFILL, "P")
        else:
            comes_at = clock.now + 0.02
    assert 0.4 < used["greedy"] / clock.now < 0.6
    assert used["trainer"] / clock.now > 0.2, "alone it has half"


def test_company_is_taken_from_all_clients_and_overtakes_nothing_of_its_own():
    queue: FairQueue[str] = FairQueue()
    for client, item in (("a", "a1"), ("a", "a2"), ("b", "B1"), ("b", "b2"), ("c", "c1"), ("c", "c2")):
        queue.put(client, DECODE, item)
    queue.put("d", FORWARD, "d1")
    ticket = queue.pop()
    assert ticket is not None
    assert ticket.item == "a1"
    batch = queue.pop_batch(lambda item: item.islower() and item != "c2")
    assert [ticket.item for ticket in batch] == ["a2", "c1"]
    for one in (ticket, *batch):
        queue.charge(one, 1.0)
    assert drain(queue, dict.fromkeys("abcd", 1.0)) == "B1b2c2d1"
    assert queue.pop_batch(lambda item: True) == []


def test_a_request_knows_where_it_stands():
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.put("a", FORWARD, "a", key=("a", number))
    first = queue.put("b", FORWARD, "b", key=("b", 0))
    assert queue.ahead(("a", 0)) == 1
    assert queue.ahead(("a", 2)) == 3
    queue.discard(first)
    assert queue.ahead(("a", 2)) == 2
    assert queue.ahead(("b", 0)) is None
    assert len(queue) == 3


def test_clients_that_are_gone_are_forgotten():
    clock = Clock()
    queue: FairQueue[str] = FairQueue(clock)
    for number in range(1000):
        queue.put(f"client {number}", FORWARD, "x")
        drain(queue, {f"client {number}": 1.0})
        clock.now += 1.0
    assert len(queue._shares) < 5


def test_accounts_count_what_is_open_and_forget_who_left():
    quotas = Quotas(ServerLimits(max_streams_per_client=2, max_client_bytes=100, max_total_bytes=200))
    one, other = quotas.open_stream("a"), quotas.open_stream("b")
    assert isinstance(one, ClientUsage)
    assert isinstance(other, ClientUsage)
    assert quotas.open_stream("a") is one
    assert "this client has 2 streams" in str(quotas.open_stream("a"))
    assert quotas.reserve(one, 100) is None
    assert "this client has" in str(quotas.reserve(one, 1))
    assert "this server is full" in str(quotas.reserve(other, 51)), "all clients together"
    assert quotas.reserve(other, 50) is None
    quotas.release(one, 100)
    quotas.release(other, 50)
    for peer in "aab":
        quotas.close_stream(peer)
    assert (quotas.num_bytes, quotas.streams, quotas.clients) == (0, 0, {})


def test_the_last_part_is_for_those_who_hold_least():
    limits = ServerLimits(max_client_bytes=100, max_total_bytes=320, max_streams=64, max_streams_per_client=48)
    quotas = Quotas(limits)
    held = []
    for number in range(3):
        usage = quotas.open_stream(str(number))
        assert isinstance(usage, ClientUsage)
        held.append(usage)
        quotas.reserve(usage, 80)
    assert quotas.num_bytes == 240
    newcomer = quotas.open_stream("new")
    assert isinstance(newcomer, ClientUsage)
    assert "this server is full" in str(quotas.reserve(held[0], 1))
    assert quotas.reserve(newcomer, 10) is None
    assert "this server is full" in str(quotas.reserve(newcomer, 1))
    while isinstance(quotas.open_stream("0"), ClientUsage):
        pass
    assert quotas.streams == 48
    assert "this server is full: 48 of 64 streams" in str(quotas.open_stream("0"))
    assert isinstance(quotas.open_call("another"), ClientUsage)


@given(st.integers(1, 10**6), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**6)), max_size=60))
def test_no_demand_takes_more_than_there_is_or_than_its_share_of_the_last_part(budget, demands):
    held = [0] * 10
    for client, amount in demands:
        taken = sum(held)
        room = room_for(held[client], taken=taken, budget=budget)
        assert room <= budget - taken
        if taken < budget - budget // 4:
            assert room > 0
        elif room:
            assert held[client] + room <= budget // 32
        held[client] += min(amount, room)


@pytest.mark.slow
def test_beside_a_greedy_client_another_keeps_its_share(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    honest = swarm.servers[0].span.forward

    def forward(inputs, *cached):  # long enough that compute is what they share
        time.sleep(0.03)
        return honest(inputs, *cached)

    swarm.servers[0].span.forward = forward
    # Each with a peer of its own: shares are counted by peer.
    modest, greedy = (swarm.load(AutoDistributedModel, initial_peers=swarm.initial_peers) for _ in range(2))
    tokens = torch.arange(1, 9)[None]

    def speed(seconds: float = 3.0) -> float:
        began, steps = time.monotonic(), 0
        with torch.no_grad():
            while time.monotonic() - began < seconds:
                modest(input_ids=tokens)
                steps += 1
        return steps / (time.monotonic() - began)

    stopping = threading.Event()

    def be_greedy() -> None:
        with torch.no_grad():
            while not stopping.is_set():
                greedy(input_ids=tokens)

    alone = speed()
    threads = [threading.Thread(target=be_greedy) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        beside = speed()
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    print(f"alone {alone:.1f} steps/s, beside a client with 12 requests open {beside:.1f}: {beside / alone:.0%}")
    assert beside / alone >= 0.4


@pytest.mark.slow
@pytest.mark.ours("counts are kept by our own stream's compute thread")
@pytest.mark.parametrize("big", [(1, 200), (64, 1)], ids=["long prefills", "large batches"])
def test_beside_big_inference_steps_of_one_client_another_trains_on(big, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)])
    span, queue = swarm.servers[0].span, swarm.servers[0].resources.compute._queue

    def lasting(seconds: float, honest):  # so that compute is what they share
        def run(*args, **kwargs):
            time.sleep(seconds)
            return honest(*args, **kwargs)

        return run

    span.step = lasting(0.3, span.step)
    span.forward_with_graph = lasting(0.03, span.forward_with_graph)
    span.backward = lasting(0.03, span.backward)
    used: dict[str, float] = {}
    honest_charge = queue.charge

    def charge(ticket, seconds):
        used[ticket.client] = used.get(ticket.client, 0.0) + seconds
        honest_charge(ticket, seconds)

    queue.charge = charge
    trainer, greedy = (
        remote_blocks(swarm.load(AutoDistributedModel, initial_peers=swarm.initial_peers)) for _ in range(2)
    )
    begun, stopping = threading.Semaphore(0), threading.Event()
    batch, tokens = big

    def be_greedy() -> None:
        with greedy.inference_session(max_length=tokens) as session:
            while not stopping.is_set():
                session.position = 0
                session.step(torch.randn(batch, tokens, HIDDEN))
                begun.release()

    threads = [threading.Thread(target=be_greedy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert begun.acquire(timeout=60)
        used.clear()
        for _ in range(20):
            hidden = torch.randn(2, 8, HIDDEN, requires_grad=True)
            trainer(hidden).sum().backward()
        by_client = dict(used)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    own = by_client.pop(trainer._swarm.node.peer_id.to_base58())
    share = own / (own + sum(by_client.values()))
    print(f"the trainer has {share:.0%} of the compute seconds")
    assert share >= 0.4
