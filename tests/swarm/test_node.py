"""One peer a process, among real peers on loopback: records, errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.protocol.uids import MODELS_KEY
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry
from tests.helpers.nodes import listen
from tools.testing.swarms import LOOPBACK

RECORD = ServerRecord(ServerState.ONLINE, 3.0, 0, 2, public_name="ours", hidden_size=8, stream_version=1)
ROOT = Path(__file__).parents[2]
STRANGER = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


@pytest.fixture
def start_node() -> Iterator[Callable[..., SwarmNode]]:
    with ExitStack() as stack:

        def start(*peers: str, **options: Any) -> SwarmNode:
            node = SwarmNode(peers, **{"host_maddrs": LOOPBACK, **options}).start()
            stack.callback(node.close)
            return node

        yield start


def daemons_of(parent: psutil.Process) -> list[psutil.Process]:
    return [process for process in parent.children(recursive=True) if process.name() == "p2pd"]


@pytest.fixture
def socket_folder(monkeypatch) -> Iterator[Path]:
    """An empty folder with a short name (sockets need one) in the place of /tmp, for daemons' sockets."""
    with tempfile.TemporaryDirectory(prefix="p l-", dir="/tmp") as folder:  # a blank in it must do no harm
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def read(node: SwarmNode, prefix: str = "m", num_blocks: int = 3) -> list[dict[str, ServerRecord]]:
    return node.run(SwarmDirectory(node).servers(prefix, num_blocks))


def test_a_record_is_seen_by_other_peers(start_node):
    server = start_node()
    client = start_node(*server.visible_maddrs(), host_maddrs=(), client_mode=True)
    directory = SwarmDirectory(server)
    assert server.run(directory.announce("m", RECORD, 60))
    peer = server.peer_id.to_base58()
    for node in (server, client):
        assert read(node) == [{peer: RECORD}, {peer: RECORD}, {}]
    assert client.peer_id != server.peer_id


def test_two_servers_of_a_block_are_both_seen(start_node):
    first = start_node()
    second = start_node(*first.visible_maddrs())
    for node in (first, second):
        assert node.run(SwarmDirectory(node).announce("m", RECORD, 60))
    assert set(read(first)[1]) == set(read(second)[1]) == {first.peer_id.to_base58(), second.peer_id.to_base58()}


def test_a_later_record_takes_the_place_of_an_earlier_one(start_node):
    node = start_node()
    directory = SwarmDirectory(node)
    offline = replace(RECORD, state=ServerState.OFFLINE)
    node.run(directory.announce("m", RECORD, 60))
    node.run(directory.announce("m", offline, 61))
    assert list(read(node)[0].values()) == [offline]


def test_a_record_expires(start_node):
    node = start_node()
    node.run(SwarmDirectory(node).announce("m", RECORD, 1.0))
    assert read(node)[0]
    assert eventually(lambda: not read(node)[0])


def test_models_are_listed_unless_private(start_node):
    node = start_node()
    directory = SwarmDirectory(node)
    shown, private = ModelEntry("shown", 4, "org/shown"), ModelEntry("_private", 4, None)
    assert node.run(directory.announce_model(shown, 60))
    assert node.run(directory.announce_model(private, 60))
    assert node.run(directory.models()) == [shown]


def test_whatever_else_peers_store_is_passed_over(start_node):
    node = start_node()
    directory = SwarmDirectory(node)

    def store(key: str, subkey: object, value: object) -> None:
        node.run(node.dht.store(key, subkey=subkey, value=value, expiration_time=get_dht_time() + 60))

    for subkey, value in [("no peer id!", RECORD.to_value()), (5, RECORD.to_value()), (STRANGER, "nonsense")]:
        store("m.0", subkey, value)
    assert node.run(directory.announce("m", RECORD, 60))
    store("m.2", None, {"a": 1})
    store("m.3", None, RECORD.to_value())
    peer = node.peer_id.to_base58()
    assert read(node, num_blocks=4) == [{peer: RECORD}, {peer: RECORD}, {}, {}]
    entries: list[tuple[str, Any]] = [
        ("a", 3),
        ("b", {"num_blocks": "4"}),
        ("c", {"num_blocks": 4, "repository": 5}),
        ("d", {"num_blocks": 10**9}),
        ("e\x1b[2J", {"num_blocks": 4}),
        ("f", {"num_blocks": 4, "repository": "\x1b]0;title\x07org/f"}),
    ]
    for name, entry in entries:
        store(MODELS_KEY, name, entry)
    assert node.run(directory.models()) == [ModelEntry("c", 4, None), ModelEntry("f", 4, "]0;title org/f")]


def test_a_list_of_models_of_another_kind_is_passed_over(start_node):
    node = start_node()
    node.run(node.dht.store(MODELS_KEY, value={"a": {"num_blocks": 1}}, expiration_time=get_dht_time() + 60))
    assert node.run(SwarmDirectory(node).models()) == []


def test_an_identity_file_keeps_the_peer_id(start_node, tmp_path):
    identity = str(tmp_path / "peer.id")
    first = start_node(identity_path=identity)
    peer = first.peer_id
    first.close()
    assert start_node(identity_path=identity).peer_id == peer
    assert start_node().peer_id != peer


@pytest.mark.slow
def test_a_peer_that_is_restarted_stands_in_others_tables_once(start_node, tmp_path):
    holder, identity = start_node(), str(tmp_path / "peer.id")
    peer = None
    for _ in range(2):
        node = start_node(*holder.visible_maddrs(), identity_path=identity)
        peer = node.peer_id
        assert node.run(SwarmDirectory(node).announce("m", RECORD, 60))
        node.close()
    table = holder.dht.protocol.routing_table
    assert list(table.uid_to_peer_id.values()).count(peer) == 1


@pytest.mark.slow
def test_an_identity_of_a_peer_that_runs_is_refused_until_that_one_is_gone(start_node, tmp_path):
    identity, copy = tmp_path / "peer.id", tmp_path / "copy.id"
    (maddr,) = start_node().visible_maddrs()
    first = start_node(maddr, identity_path=str(identity))
    other = start_node(maddr, host_maddrs=(), client_mode=True)
    assert eventually(lambda: other.run(other.dht.protocol.call_ping(first.peer_id)) is not None)  # it is known there
    shutil.copy(identity, copy)
    for peers in ([maddr], first.visible_maddrs(), [maddr, *first.visible_maddrs()]):
        with pytest.raises(
            ConfigurationError, match=rf"'{copy}' is in use: .*{first.peer_id}.*stop that one, or"
        ) as error:
            start_node(*peers, identity_path=str(copy))
        assert "\n" not in str(error.value)
    assert first.is_alive
    (daemon,) = [each for each in daemons_of(psutil.Process()) if str(identity) in " ".join(each.cmdline())]
    daemon.kill()
    assert start_node(maddr, identity_path=str(copy)).peer_id == first.peer_id


def test_an_identity_that_cannot_be_written_is_named():
    with pytest.raises(SwarmConnectionError, match=r"/nowhere/peer\.id"):
        SwarmNode(identity_path="/nowhere/peer.id", host_maddrs=LOOPBACK).start()


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n", bytes(range(100))], ids=["empty", "text", "bytes"])
def test_an_identity_file_that_is_none_is_named_and_left_alone(content, tmp_path, socket_folder):
    file = tmp_path / "peer.id"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"the identity file '{file}' holds no private key.*will be made"):
        SwarmNode(identity_path=str(file), host_maddrs=LOOPBACK).start()
    assert file.read_bytes() == content
    with pytest.raises(SwarmConnectionError, match=rf"identity file '{tmp_path}': Is a directory"):
        SwarmNode(identity_path=str(tmp_path), host_maddrs=LOOPBACK).start()
    assert list(socket_folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of Linux")
def test_a_folder_that_is_too_long_for_sockets_is_named(start_node, socket_folder, monkeypatch):
    room = 107 - len("/petals-lightning-p2pd-0123456789ab.sock")
    for length in (room, room + 1):
        folder = socket_folder / ("x" * (length - len(str(socket_folder)) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        if length == room:
            assert start_node().is_alive
        else:
            with pytest.raises(ConfigurationError, match=rf"TMPDIR={folder}: its {length} characters are too long"):
                start_node()


def test_an_unreachable_peer_is_named_with_the_fix_and_nothing_is_left(socket_folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    me, threads = psutil.Process(), threading.active_count()
    maddr = f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}"
    with pytest.raises(SwarmConnectionError, match=rf"{maddr}.*Check that a peer runs there"):
        SwarmNode([maddr], host_maddrs=(), client_mode=True, connect_timeout=10).start()
    assert eventually(lambda: not daemons_of(me) and threading.active_count() <= threads)
    assert list(socket_folder.iterdir()) == []


def test_the_time_that_was_waited_is_told_and_not_the_longest_allowed():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        maddr = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{STRANGER}"
        began = time.monotonic()
        with pytest.raises(SwarmConnectionError, match="none of initial_peers") as error:
            SwarmNode([maddr], host_maddrs=(), client_mode=True, connect_timeout=500).start()
        waited = time.monotonic() - began
    told = re.search(r"given up after (\d+) s", str(error.value))
    assert told is not None
    assert int(told[1]) <= waited + 1
    assert "500 s" not in str(error.value)


def test_a_port_that_is_taken_is_an_error_of_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        maddr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(SwarmConnectionError, match="cannot start a swarm node") as error:
            SwarmNode(host_maddrs=[maddr], connect_timeout=10).start()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "maddr", ["", "here", "127.0.0.1:80", "/ip4/127.0.0.1/tcp/80", "/ip4/127.0.0.1/tcp/80/p2p/me", f"/p2p/{STRANGER}x"]
)
def test_a_malformed_multiaddress_is_refused_before_anything_starts(maddr):
    with pytest.raises(ConfigurationError, match="initial_peers"):
        SwarmNode([maddr])


def test_close_leaves_nothing_and_may_be_repeated(start_node, socket_folder):
    me, threads = psutil.Process(), threading.active_count()
    node = start_node()
    callback_socket = listen(node)
    assert daemons_of(me)
    assert callback_socket.exists()
    assert len(list(socket_folder.iterdir())) == 1
    node.close()
    node.close()
    assert not daemons_of(me)
    assert not callback_socket.exists()
    assert list(socket_folder.iterdir()) == []
    assert eventually(lambda: threading.active_count() <= threads)


@pytest.mark.slow
def test_a_node_whose_daemon_has_died_still_closes(start_node, socket_folder):
    me, threads = psutil.Process(), threading.active_count()
    node = start_node()
    (daemon,) = daemons_of(me)
    node.check_alive()
    daemon.kill()
    assert eventually(lambda: not node.is_alive)
    with pytest.raises(SwarmConnectionError, match=r"daemon has ended.*start the run again"):
        node.check_alive()
    node.close()
    assert list(socket_folder.iterdir()) == []
    assert eventually(lambda: threading.active_count() <= threads)


def test_a_node_that_was_not_started_can_be_closed():
    SwarmNode().close()


def test_an_interrupted_wait_cancels_its_coroutine(start_node):
    node, cancelled = start_node(), threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        node.run(wait(), timeout=0.1)
    assert cancelled.wait(10)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_daemon_and_no_socket(socket_folder):
    code = f"""
import time
from petals_lightning.swarm import SwarmNode
from tests.helpers.nodes import listen
node = SwarmNode(host_maddrs={LOOPBACK!r}).start()
print(listen(node), flush=True)
time.sleep(100)
"""
    environment = {**os.environ, "TMPDIR": str(socket_folder)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        callback_socket = Path(process.stdout.readline().strip())
        assert callback_socket.is_socket()
        assert len(list(socket_folder.iterdir())) == 1
        started = psutil.Process(process.pid).children(recursive=True)
        assert any(child.name() == "p2pd" for child in started)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert eventually(lambda: not callback_socket.exists() and list(socket_folder.iterdir()) == [])
