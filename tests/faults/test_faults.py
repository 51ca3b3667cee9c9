"""A quick part of the matrix of faults and phases; `python -m tests.faults` runs all of it and prints the stalls."""

from __future__ import annotations

import socket
import time

import pytest

from tests.faults.harness import BOUNDS, FaultySwarm, Trace, run_case, train, train_remotely
from tests.faults.proxy import TcpProxy

ROOM = 2.0  # a busy machine may take this much longer than the promise


@pytest.fixture(scope="module")
def swarm(heavier_checkpoint, servers):
    with FaultySwarm(heavier_checkpoint, servers) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def undisturbed(swarm) -> Trace:
    trace = train_remotely(swarm)
    assert trace.differs_from(train(swarm.load_local())) < 1e-4
    assert trace.retries == 0
    return trace


@pytest.mark.parametrize(
    ("fault", "phase", "limit"),
    [("hang", "backward", 10), ("black hole", "forward", 10), ("cut", "backward", 2), ("kill", "between", 1)],
)
def test_a_fault_changes_no_loss_and_no_gradient(fault, phase, limit, swarm, undisturbed, servers):
    case = run_case(swarm, fault, phase, undisturbed)
    print(f"{fault} in {phase}: stall {case.stall:.2f} s, later {case.later_stall:.2f} s, {case.difference:.1e} off")
    assert case.difference < BOUNDS[servers]
    assert case.stall < limit + ROOM


def test_the_proxy_black_holes_cuts_and_heals():
    with socket.create_server(("127.0.0.1", 0)) as target:
        proxy = TcpProxy(target.getsockname()[1])
        try:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
                server, _ = target.accept()
                client.sendall(b"one")
                assert server.recv(10) == b"one"
                proxy.black_hole()
                time.sleep(0.1)
                client.sendall(b"two")
                server.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    server.recv(10)
                proxy.heal()
                server.settimeout(5)
                assert server.recv(10) == b"two"
                proxy.delay = 0.3
                began = time.monotonic()
                server.sendall(b"late")
                assert client.recv(10) == b"late"
                assert time.monotonic() - began >= 0.3
                proxy.cut()
                assert has_ended(client)
                server.close()
        finally:
            proxy.close()


def has_ended(client: socket.socket) -> bool:
    try:
        return client.recv(10) == b""
    except ConnectionError:
        return True
