"""This process's peer: libp2p daemon and DHT node, driven by one asyncio loop in a background thread.

hivemind's own `DHT` forks a process and talks to it through shared memory; its `DHTNode` and `P2P` run in-process as
well as there, and that is all that is used here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import re
import threading
import time
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.protocol.identity import Identity
from petals_lightning.swarm.daemon import P2PDaemon
from petals_lightning.swarm.hivemind_patches import bound_nesting
from petals_lightning.swarm.identity_check import check_identity_is_free
from petals_lightning.swarm.joining import Acquaintances, ClockError, meet
from petals_lightning.swarm.public import is_public
from petals_lightning.swarm.record_keeping import RecordRules, keep_records_carefully

logger = logging.getLogger(__name__)

T = TypeVar("T")

MEETING_PERIOD = 10.0  # seconds between looks for peers that were lost
DEFAULT_HOST_MADDRS = ("/ip4/0.0.0.0/tcp/0",)


class SwarmNode:
    """A peer of a swarm. `start` joins it, `close` leaves it; both may be called from any thread.

    Args:
        initial_peers: multiaddresses of peers to join, also as one text with commas or blanks between; none starts a
            new swarm.
        host_maddrs: addresses to listen on; empty for a peer that only calls others.
        announce_maddrs: addresses that others are told, where they differ (NAT).
        identity_path: file of the private key, made if missing; the peer id follows from it.
        client_mode: use the DHT without storing others' records.
        connect_timeout: seconds to start the daemon and to reach an initial peer.
    """

    def __init__(
        self,
        initial_peers: str | Sequence[str] = (),
        *,
        host_maddrs: Sequence[str] = DEFAULT_HOST_MADDRS,
        announce_maddrs: Sequence[str] | None = None,
        identity_path: str | None = None,
        client_mode: bool = False,
        connect_timeout: float = 30.0,
    ):
        self.initial_peers = [check_peer_maddr(peer) for peer in split_maddrs(initial_peers)]
        self._daemon = P2PDaemon(
            initial_peers=self.initial_peers,
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs or (),
            identity_path=identity_path,
            dht_server=not client_mode,
            start_timeout=connect_timeout,
        )
        self._client_mode, self._connect_timeout = client_mode, connect_timeout
        self._checked_identity = identity_path if host_maddrs and self.initial_peers else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._p2p: P2P | None = None
        self._dht: DHTNode | None = None
        self._acquaintances: Acquaintances | None = None
        self._meeting: asyncio.Task[None] | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "the node has not been started"
        return self._loop

    @property
    def p2p(self) -> P2P:
        assert self._p2p is not None, "the node has not been started"
        return self._p2p

    @property
    def dht(self) -> DHTNode:
        assert self._dht is not None, "the node has not been started"
        return self._dht

    @property
    def is_alive(self) -> bool:
        """Whether the daemon runs, without which nobody can reach this peer."""
        return self._daemon.is_alive

    def check_alive(self) -> None:
        """Raises SwarmConnectionError if the daemon has ended."""
        if not self._daemon.is_alive:
            raise SwarmConnectionError(
                f"this process's libp2p daemon has ended, and with it all connections (last words: "
                f"{self._daemon.last_words()}): start the run again (a training run goes on with resume=true)"
            )

    @property
    def peer_id(self) -> PeerID:
        return self.p2p.peer_id

    @property
    def identity(self) -> Identity:
        """The private key that the peer id follows from."""
        return self._daemon.identity

    def start(self) -> SwarmNode:
        """Joins the swarm.

        Raises:
            SwarmConnectionError: the daemon does not start, no initial peer answers in `connect_timeout` seconds, or
                their clocks and this machine's differ.
            ConfigurationError: the identity file holds no key, or that of a peer that runs already (peers that only
                call others are not looked for); or TMPDIR is too long for sockets.
        """
        started, self._process = threading.Event(), os.getpid()
        self._thread = threading.Thread(target=self._run_loop, args=(started,), name="swarm", daemon=True)
        self._thread.start()
        started.wait()
        try:
            self.run(self._join())
        except BaseException:
            self.close()
            raise
        return self

    @property
    def is_running(self) -> bool:
        """Whether it was started in this process and not closed yet."""
        return self._thread is not None and self._process == os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs a coroutine on the loop and waits for its result; cancels it if the wait is interrupted."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine on the loop.

        Raises:
            SwarmConnectionError: this process is a fork of the one that joined the swarm.
        """
        if self._process != os.getpid():
            coroutine.close()
            raise SwarmConnectionError(
                "this process was forked from the one that joined the swarm, and has none of its threads: load the "
                "model here, or start the process by 'spawn' (multiprocessing.get_context('spawn'))"
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def visible_maddrs(self) -> list[str]:
        """Multiaddresses, ending in `/p2p/<peer id>`, by which others can reach this peer."""
        return [str(maddr) for maddr in self.run(self.p2p.get_visible_maddrs(latest=True))]

    def close(self) -> None:
        """Leaves the swarm, ends the daemon and the thread. Does nothing if it was closed before."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self.run(self._leave(), timeout=10)
        except (OSError, P2PDaemonError, concurrent.futures.TimeoutError) as e:
            logger.warning("the swarm node did not leave in order: %s", str(e) or type(e).__name__)
        self.loop.call_soon_threadsafe(self.loop.stop)
        thread.join()

    def _run_loop(self, started: threading.Event) -> None:
        self._loop = uvloop.new_event_loop()  # this thread's only: notebooks and callers keep their loops
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(started.set)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))  # closed transports take one more turn
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _join(self) -> None:
        bound_nesting()
        keep_records_carefully()
        began = time.monotonic()
        try:
            if self._checked_identity is not None:
                await check_identity_is_free(self._checked_identity, self.initial_peers, self._connect_timeout)
            self._p2p = await self._daemon.start()
            async with asyncio.timeout(self._connect_timeout):
                self._dht = await DHTNode.create(
                    self._p2p,
                    # hivemind draws an id; then one that is restarted stands in others' tables twice.
                    node_id=DHTID.generate(source=self.identity.peer_id),
                    client_mode=self._client_mode,
                    record_validator=RecordRules(),
                )
                if self.initial_peers:
                    await meet(self._dht, self.initial_peers)
            self._acquaintances = Acquaintances(self._p2p, self._dht, self.initial_peers)
            self._meeting = asyncio.create_task(self._keep_meeting())
        except (TimeoutError, SwarmConnectionError, P2PDaemonError, RuntimeError, OSError) as e:
            raise SwarmConnectionError(self._explain(e, time.monotonic() - began)) from e

    def _explain(self, error: BaseException, seconds: float) -> str:
        """What went wrong, so many seconds after the start: the daemon may give up before `connect_timeout`."""
        detail = str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
        if isinstance(error, ClockError):
            swarm = "the public Petals network" if is_public(self.initial_peers) else "the swarm"
            return (
                f"cannot join {swarm}: this machine's clock is {detail} those of initial_peers "
                f"[{', '.join(self.initial_peers)}]. Check that both machines' clocks agree within "
                f"{MAX_DHT_TIME_DISCREPANCY_SECONDS} s: set the wrong one, e.g. by `timedatectl set-ntp true`"
            )
        if is_public(self.initial_peers):
            return (
                f"cannot reach the public Petals network: none of its bootstrap peers answered, given up after "
                f"{seconds:.0f} s ({detail}). Check that this machine reaches the internet (ports 31337 "
                "and 31338) and that its clock is right; to use a swarm of your own give initial_peers=[…] (in a run: "
                "swarm=private)"
            )
        if self.initial_peers:
            peers = ", ".join(self.initial_peers)
            return (
                f"cannot join the swarm: none of initial_peers [{peers}] answered, given up after {seconds:.0f} s "
                f"({detail}). Check that a peer runs there (`petals-lightning serve`/`bootstrap` print their "
                "addresses), that its port is open, and that both machines' clocks agree within 3 s"
            )
        return f"cannot start a swarm node: {detail}"

    async def meet_again(self) -> None:
        """Looks for peers that this one has lost: its initial peers, and those that it met later."""
        assert self._acquaintances is not None, "the node has not been started"
        await self._acquaintances.meet_again()

    async def _keep_meeting(self) -> None:
        while True:
            await asyncio.sleep(MEETING_PERIOD)
            try:
                await self.meet_again()
            except (OSError, RuntimeError, P2PDaemonError) as e:
                logger.info("peers that were lost could not be looked for: %s", e)

    async def _leave(self) -> None:
        if self._meeting is not None:
            self._meeting.cancel()
        try:
            if self._dht is not None:
                await asyncio.wait_for(self._dht.shutdown(), 3)  # hangs if the daemon is dead
        finally:
            await self._daemon.stop()


def split_maddrs(given: str | Iterable[object]) -> list[str]:
    """Multiaddresses that are given one by one, or several as one text with commas or blanks between."""
    texts = [given] if isinstance(given, str) else map(str, given)
    return [maddr for text in texts for maddr in re.split(r"[\s,]+", text.strip())]


def check_peer_maddr(maddr: str) -> str:
    """Returns `maddr` if it is the multiaddress of a peer.

    Raises:
        ConfigurationError: it is not, or lacks the peer's id.
    """
    try:
        Multiaddr(maddr)["p2p"]
    except Exception as e:  # multiaddr documents no common base for its errors
        raise ConfigurationError(
            f"initial_peers: {maddr!r} is no peer's multiaddress; one looks like /ip4/10.0.0.1/tcp/31337/p2p/Qm… "
            "and is printed by `petals-lightning serve` and `petals-lightning bootstrap`"
        ) from e
    return str(maddr)
