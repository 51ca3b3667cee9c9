"""`petals-lightning` as its user runs it: processes, signals, lines on the screen, exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from petals_lightning.cli.main import main
from petals_lightning.hf import Checkpoint, block_bytes
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.strategies.server_process import ServerProcess, launch
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from tests.helpers.families import NUM_BLOCKS
from tools.testing.forks import run_command
from tools.testing.servers import start_server
from tools.testing.swarms import LOOPBACK, PREFIX

COMMAND = [sys.executable, "-m", "petals_lightning.cli.main"]
STRANGER = "/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def family_of(server: ServerProcess) -> list[psutil.Process]:
    """The command's process and every one that it has started."""
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def seconds_to_leave(server: ServerProcess, number: signal.Signals = signal.SIGINT) -> float:
    """Sends the signal; returns the time until the command has ended, without an error."""
    began = time.monotonic()
    server.signal(number)
    assert server.wait(30) == 0
    return time.monotonic() - began


@pytest.fixture
def run() -> Iterator[Callable[..., ServerProcess]]:
    """`run("serve", …)` is a command that is ready; what it writes to stderr is not read."""
    with ExitStack() as stack:

        def start(*arguments: str) -> ServerProcess:
            running = ServerProcess(launch(arguments, stderr=subprocess.DEVNULL), " ".join(arguments)).start()
            stack.callback(running.stop)
            return running.wait_until_ready()

        yield start


@pytest.fixture
def join() -> Iterator[Callable[[str], SwarmNode]]:
    with ExitStack() as stack:

        def start(maddr: str) -> SwarmNode:
            node = SwarmNode([maddr], host_maddrs=LOOPBACK).start()
            stack.callback(node.close)
            return node

        yield start


def serve(checkpoint: Path, *extra: str) -> list[str]:
    return ["serve", str(checkpoint), "--dht-prefix", PREFIX, "--host-maddrs", *LOOPBACK, "--threads", "1", *extra]


def records(node: SwarmNode) -> list[dict[str, ServerRecord]]:
    return node.run(SwarmDirectory(node).servers(PREFIX, NUM_BLOCKS))


@pytest.mark.slow
def test_a_server_announces_itself_and_leaves_in_order(run, join, tiny_checkpoint):
    server = run(*serve(tiny_checkpoint("llama"), "--new-swarm", "--block-indices", "1:3", "--public-name", "me"))
    assert server.lines[-1] == f"ready: blocks 1:3 of {PREFIX} in float32 on cpu\n"
    family, client = family_of(server), join(server.maddr)
    found = records(client)
    assert [set(block) for block in found] == [set(), {server.peer_id}, {server.peer_id}, set()]
    record = found[1][server.peer_id]
    assert (record.state, record.start, record.end, record.public_name) == (ServerState.ONLINE, 1, 3, "me")
    assert seconds_to_leave(server) < 5, "the promise is to leave within 5 s"
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert all(record.state is ServerState.OFFLINE for block in records(client) for record in block.values())


@pytest.mark.slow
def test_a_bootstrap_peer_keeps_its_address_and_servers_join_where_they_are_needed(
    run, join, start_swarm, tiny_checkpoint, tmp_path
):
    identity = ["--identity-path", str(tmp_path / "bootstrap.id"), "--host-maddrs", *LOOPBACK]
    first = run("bootstrap", *identity)
    family = family_of(first)
    assert seconds_to_leave(first) < 5
    assert psutil.wait_procs(family, timeout=10)[1] == []
    second = run("bootstrap", *identity)
    assert second.peer_id == first.peer_id
    checkpoint = tiny_checkpoint("llama")
    # Throughput as on a quiet machine: where it is measured beside other tests, one server may seem worth two.
    start_swarm(checkpoint, [(0, 2), (1, 2), (3, 4)], initial_peers=[second.maddr], throughput=1.0)
    chosen = run(*serve(checkpoint, "--initial-peers", second.maddr, "--num-blocks", "2"))
    assert chosen.lines[-1].startswith("ready: blocks 2:4 "), "the swarm is thinnest there"
    client = join(second.maddr)
    assert [len(block) for block in records(client)] == [1, 2, 1, 2]
    assert seconds_to_leave(chosen, signal.SIGTERM) < 5
    assert [record.state for record in records(client)[2].values()] == [ServerState.OFFLINE]


@pytest.mark.slow
def test_a_server_with_the_identity_of_another_says_so_and_starts_when_that_one_was_killed(tiny_checkpoint, tmp_path):
    checkpoint, identity, copy = tiny_checkpoint("llama"), tmp_path / "server.id", tmp_path / "copy.id"
    servers = [start_server(checkpoint, (0, 2)).wait_until_ready()]
    maddr = servers[0].maddr
    try:
        servers.append(start_server(checkpoint, (2, 4), [maddr], "--identity-path", str(identity)).wait_until_ready())
        shutil.copy(identity, copy)
        servers.append(start_server(checkpoint, (2, 4), [maddr], "--identity-path", str(copy)))
        assert servers[-1].wait(60) == 1
        (error,) = [line for line in servers[-1].lines if line.startswith("error: ")]
        assert f"the identity file '{copy}' is in use: a peer of its id, {servers[1].peer_id}, runs" in error
        servers[1].signal(signal.SIGKILL)
        servers.append(start_server(checkpoint, (2, 4), [maddr], "--identity-path", str(copy)).wait_until_ready())
        assert servers[-1].peer_id == servers[1].peer_id
    finally:
        for server in servers:
            server.stop()


LLAMA, EMPTY = "a tiny llama", "an empty folder"
NEW = [LLAMA, "--new-swarm", "--dht-prefix", "x"]
USER_ERRORS = {
    "no way into a swarm": ([LLAMA, "--dht-prefix", "x"], "give either --initial-peers MADDR"),
    "two ways": ([*NEW, "--initial-peers", STRANGER], "give either --initial-peers MADDR"),
    "blocks chosen twice": ([*NEW, "--block-indices", "0:1", "--num-blocks", "1"], "not both"),
    "malformed blocks": ([*NEW, "--block-indices", "one"], "START:END"),
    "blocks out of range": ([*NEW, "--block-indices", "2:9"], "2:9 do not exist"),
    "no blocks": ([*NEW, "--num-blocks", "0"], "--num-blocks is 0"),
    "a folder without a prefix": ([LLAMA, "--new-swarm"], "--dht-prefix NAME"),
    "a bad prefix": ([LLAMA, "--new-swarm", "--dht-prefix", "a.b"], "'a-b'"),
    "a folder without config": ([EMPTY, "--new-swarm", "--dht-prefix", "x"], "has no config.json"),
    "a malformed peer": ([LLAMA, "--initial-peers", "/ip4/127.0.0.1/tcp/80", "--dht-prefix", "x"], "is not a peer's"),
    "a peer that is not there": ([LLAMA, "--initial-peers", STRANGER, "--dht-prefix", "x"], "cannot join the swarm"),
    "an unknown dtype": ([*NEW, "--dtype", "int8"], "choose auto, float32"),
    "an unknown device": ([*NEW, "--device", "abacus"], "--device 'abacus'"),
    "no threads": ([*NEW, "--threads", "0"], "--threads is 0"),
    "no tokens": ([*NEW, "--max-batch-tokens", "0"], "--max-batch-tokens is 0"),
    "a negative throughput": ([*NEW, "--throughput", "-1"], "--throughput is -1"),
    "no memory": ([*NEW, "--graph-memory", "nan"], "--graph-memory is nan"),
    "no period": ([*NEW, "--update-period", "0"], "--update-period is 0"),
}


@pytest.mark.parametrize(("given", "words"), USER_ERRORS.values(), ids=USER_ERRORS)
def test_a_users_error_is_one_line_that_says_what_to_mend(given, words, tiny_checkpoint, tmp_path):
    places = {LLAMA: str(tiny_checkpoint("llama")), EMPTY: str(tmp_path)}
    done = run_command("serve", *(places.get(item, item) for item in given))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


@pytest.mark.slow
def test_a_server_holds_as_many_blocks_as_fit_in_memory(run, tiny_checkpoint):
    checkpoint = tiny_checkpoint("llama")
    (size,) = set(block_bytes(LlamaModel, Checkpoint(checkpoint), "auto"))
    budgets = ["--graph-memory", "0", "--cache-memory", "0", "--max-total-bytes", "1"]
    memory = ["--memory", str(2.5 * size / 0.9 / 2**30)]
    assert run(*serve(checkpoint, "--new-swarm", *budgets, *memory)).lines[-1].startswith("ready: blocks 0:2 of ")
    done = run_command(*serve(checkpoint, "--new-swarm", *budgets, "--memory", "1e-5"))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: not one block fits, each takes ")
    assert "1e-05 GiB are free; weights of 0 of 4 blocks 0, graphs 0, keys and values 0, requests " in error


def save_hollow_checkpoint(folder: Path, gib: int) -> Path:
    """A model of one block that takes so much memory, and no room on the disk: a sparse file of zeros."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=gib * (1 << 30) // (3 * 64 * 4), num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=100, dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in weights.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def short_of_memory() -> None:
    """The command on a machine that has 512 MiB left."""
    import petals_lightning.server.server  # its libraries take address space, too

    assert petals_lightning.server.server
    size = psutil.Process().memory_info().vms + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    main()


@pytest.mark.slow
def test_blocks_that_do_not_fit_are_one_line(tmp_path):
    folder = save_hollow_checkpoint(tmp_path, gib=2)
    done = run_command(*serve(folder, "--new-swarm", "--num-blocks", "1"), program=short_of_memory)
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(error) == 1, done.stderr
    assert error[0].startswith("error: blocks 0:1 of ")
    assert "do not fit in the memory of this machine's cpu" in error[0]
    assert "Hold fewer blocks with --num-blocks" in error[0]


@pytest.mark.slow
def test_a_users_error_ends_the_process_with_status_1(tiny_checkpoint):
    done = subprocess.run(
        [*COMMAND, *serve(tiny_checkpoint("llama"))], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: give either --initial-peers MADDR")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_address_is_one_line_on_a_narrow_terminal(tiny_checkpoint):
    """Users copy it, and parent processes read it, whatever is shown beside it while blocks are loaded."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    arguments = [*COMMAND, *serve(tiny_checkpoint("llama")), "--new-swarm"]
    server = subprocess.Popen(arguments, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    said = ""
    try:
        while "ready: " not in said:
            said += os.read(ours, 4096).decode()  # the test's time limit ends it; the end of the server, an OSError
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        os.close(ours)
    assert re.search(r"multiaddress: /ip4/127\.0\.0\.1/tcp/\d+/p2p/\w{46,52}\r\n", said), said
    assert "loading model" in said, "the bar was shown"
