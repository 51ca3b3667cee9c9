"""This process's peer: libp2p daemon and DHT node, driven by one asyncio loop in a background thread.

hivemind's own `DHT` forks a process and talks to it through shared memory. Its `DHTNode` and `P2P` also run in this
process, and only these are used here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import re
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from petals_lightning.errors import ConfigurationError, SwarmConnectionError
from petals_lightning.protocol.identity import Identity
from petals_lightning.swarm.daemon import P2PDaemon, RunningDaemon, is_loopback
from petals_lightning.swarm.hivemind_patches import bound_nesting
from petals_lightning.swarm.identity_check import check_identity_is_free
from petals_lightning.swarm.joining import ClockError, KnownPeers, meet
from petals_lightning.swarm.loop_thread import LoopThread
from petals_lightning.swarm.public import is_public
from petals_lightning.swarm.reachability import CallBack, can_be_called, relay_of
from petals_lightning.swarm.record_keeping import RecordRules, use_record_rules
from petals_lightning.swarm.relays import start_relay, warn_of_short_relays

logger = logging.getLogger(__name__)

T = TypeVar("T")

MEETING_PERIOD = 10.0  # seconds between looks for peers that were lost
DEFAULT_HOST_MADDRS = ("/ip4/0.0.0.0/tcp/0",)
RELAY_CHOICES = ("auto", "always", "never")
_RELAY_TIMEOUT = 15.0  # seconds for a relay to take calls for this peer
_NO_RELAY = (
    "other peers cannot call this one, and no initial peer relays their calls: forward a port of the router to this "
    "machine and give --host-maddrs /ip4/0.0.0.0/tcp/PORT --announce-maddrs /ip4/PUBLIC_ADDRESS/tcp/PORT, or join by "
    "the address of a `petals-lightning bootstrap` that everybody can call; --relay never goes online all the same"
)


class SwarmNode:
    """A peer of a swarm. `start` joins it, `close` leaves it; both may be called from any thread.

    Args:
        initial_peers: multiaddresses of peers to join, as a list or as one text separated by commas or spaces; without
            any, the node starts a new swarm.
        host_maddrs: addresses to listen on; empty for a peer that only calls others.
        announce_maddrs: addresses to announce to others, if they differ (NAT).
        identity_path: file of the private key, made if missing; the peer id follows from it.
        client_mode: use the DHT without storing others' records.
        connect_timeout: seconds to start the daemon and to reach an initial peer.
        relay: what to do if others cannot call this peer: "auto" asks some of them, and if they cannot, has calls pass
            a relay; "always" does so without asking; "never" does neither.
        is_relay: this peer can be called by all, and is a relay for others. So is a peer that starts a swarm.
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
        relay: str = "never",
        is_relay: bool = False,
    ):
        if relay not in RELAY_CHOICES:
            raise ConfigurationError(f"relay is {relay!r}: choose one of {', '.join(RELAY_CHOICES)}")
        self.initial_peers = [check_peer_maddr(peer) for peer in split_maddrs(initial_peers)]
        self._daemon_options: dict[str, Any] = {
            "initial_peers": self.initial_peers,
            "host_maddrs": host_maddrs,
            "announce_maddrs": announce_maddrs or (),
            "identity_path": identity_path,
            "start_timeout": connect_timeout,
        }
        is_for_others = not all(map(is_loopback, host_maddrs))
        self._relay = relay if is_for_others and self.initial_peers else "never"
        self._is_relay = is_for_others and (is_relay or not self.initial_peers)
        self._client_mode, self._connect_timeout = client_mode, connect_timeout
        self._checked_identity = identity_path if host_maddrs and self.initial_peers else None
        self._thread: LoopThread | None = None
        self._membership: _Membership | None = None
        self._is_closed = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._started.loop

    @property
    def p2p(self) -> P2P:
        return self._joined.daemon.p2p

    @property
    def dht(self) -> DHTNode:
        return self._joined.dht

    @property
    def daemon(self) -> RunningDaemon:
        """This peer's libp2p daemon."""
        return self._joined.daemon

    @property
    def is_alive(self) -> bool:
        """Whether the daemon runs; without it this peer cannot be reached."""
        return self._membership is not None and self._membership.daemon.is_alive

    def check_alive(self) -> None:
        """Raises SwarmConnectionError if the daemon has ended."""
        if not self.daemon.is_alive:
            raise SwarmConnectionError(
                f"this process's libp2p daemon has ended, and with it all connections (last words: "
                f"{self.daemon.last_log_line()}): start the run again (a training run goes on with resume=true)"
            )

    @property
    def peer_id(self) -> PeerID:
        return self.p2p.peer_id

    @property
    def identity(self) -> Identity:
        """The private key that the peer id follows from."""
        return self.daemon.identity

    def start(self) -> SwarmNode:
        """Joins the swarm.

        Raises:
            SwarmConnectionError: the daemon does not start, no initial peer answers in `connect_timeout` seconds, or
                their clocks and this machine's differ.
            ConfigurationError: the identity file holds no key, or that of a peer that is already running (peers that
                only call others are not found); or TMPDIR is too long for sockets.
        """
        self._thread, self._is_closed = LoopThread.start("swarm"), False
        try:
            self._membership = self.run(self._join())
        except BaseException:
            self.close()
            raise
        return self

    @property
    def using_relay(self) -> bool:
        """Whether others' calls to this peer pass a relay."""
        return self._joined.using_relay

    @property
    def is_running(self) -> bool:
        """Whether it was started in this process and is not closed."""
        return self._thread is not None and self._thread.is_of_this_process and not self._is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Runs a coroutine on the loop and waits for its result; cancels it if the wait is interrupted."""
        return self._started.run(coroutine, timeout)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine on the loop.

        Raises:
            SwarmConnectionError: this process is a fork of the one that joined the swarm.
        """
        return self._started.submit(coroutine)

    def visible_maddrs(self) -> list[str]:
        """Multiaddresses, ending in `/p2p/<peer id>`, by which others can reach this peer."""
        return [str(maddr) for maddr in self.run(self.p2p.get_visible_maddrs(latest=True))]

    async def meet_again(self) -> None:
        """Calls peers that this one has lost: its initial peers, and those that it met later."""
        await self._joined.known_peers.meet_again()

    def close(self) -> None:
        """Leaves the swarm, ends the daemon and the thread. Does nothing if the node is not running."""
        if self._thread is None or self._is_closed:
            return
        self._is_closed = True
        try:
            if self._membership is not None:
                self.run(self._membership.leave(), timeout=10)
        except (OSError, P2PDaemonError, concurrent.futures.TimeoutError) as e:
            logger.warning("the swarm node did not leave in order: %s", str(e) or type(e).__name__)
        self._thread.stop()

    @property
    def _started(self) -> LoopThread:
        assert self._thread is not None, "the node has not been started"
        return self._thread

    @property
    def _joined(self) -> _Membership:
        assert self._membership is not None, "the node has not been started"
        return self._membership

    async def _join(self) -> _Membership:
        bound_nesting()
        use_record_rules()
        began = time.monotonic()
        try:
            if self._checked_identity is not None:
                await check_identity_is_free(self._checked_identity, self.initial_peers, self._connect_timeout)
            membership = await self._join_as(using_relay=self._relay == "always")
            if self._relay == "auto" and await membership.can_be_called() is False:
                await membership.leave()
                membership = await self._join_as(using_relay=True)
            return membership
        except (TimeoutError, SwarmConnectionError, P2PDaemonError, RuntimeError, OSError) as e:
            raise SwarmConnectionError(self._explain(e, time.monotonic() - began)) from e

    async def _join_as(self, *, using_relay: bool) -> _Membership:
        """Joins as a peer that others can call, or that they can call by a relay only."""
        # Peers keep records on peers that they can call.
        client_mode = self._client_mode or using_relay
        async with AsyncExitStack() as started:
            options = {**self._daemon_options, "dht_server": not client_mode}
            if self._is_relay and not using_relay:
                daemon = await start_relay(**options)
            else:
                daemon = await P2PDaemon(**options, is_reachable=False if using_relay else None).start()
            started.push_async_callback(daemon.stop)
            async with asyncio.timeout(self._connect_timeout):
                dht = await DHTNode.create(
                    daemon.p2p,
                    # hivemind draws a random id; a restarted peer would then be in others' tables twice.
                    node_id=DHTID.generate(source=daemon.identity.peer_id),
                    client_mode=client_mode,
                    record_validator=RecordRules(),
                )
                started.push_async_callback(_shut_down, dht)
                if self.initial_peers:
                    await meet(dht, self.initial_peers)
            if using_relay:
                await warn_of_short_relays(daemon.p2p, await _wait_for_relay(daemon.p2p))
            elif not client_mode:
                await CallBack(daemon.p2p).register()
            known_peers = KnownPeers(daemon.p2p, dht, self.initial_peers)
            meeting = asyncio.create_task(_keep_meeting(known_peers))
            return _Membership(daemon, dht, known_peers, meeting, started.pop_all(), using_relay)

    def _explain(self, error: BaseException, seconds: float) -> str:
        """The message for an error after so many seconds: the daemon may give up before `connect_timeout`."""
        detail = str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
        if str(error) == _NO_RELAY:
            return _NO_RELAY
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


@dataclass
class _Membership:
    """What a node has while it is in a swarm. For the node's loop.

    Attributes:
        meeting: looks for lost peers, again and again.
        started: ends the DHT node and the daemon.
        using_relay: others can call this peer by a relay only.
    """

    daemon: RunningDaemon
    dht: DHTNode
    known_peers: KnownPeers
    meeting: asyncio.Task[None]
    started: AsyncExitStack
    using_relay: bool

    async def can_be_called(self) -> bool | None:
        """Whether most of the peers that were asked can call this one; None if nobody can say."""
        maddrs = await self.daemon.p2p.get_visible_maddrs(latest=True)
        return await can_be_called(self.daemon.p2p, self.dht.protocol.routing_table.peer_id_to_uid, maddrs)

    async def leave(self) -> None:
        self.meeting.cancel()
        await self.started.aclose()


async def _shut_down(dht: DHTNode) -> None:
    try:
        async with asyncio.timeout(3):  # it hangs if the daemon is dead
            await dht.shutdown()
    except (OSError, P2PDaemonError) as e:  # the daemon must be ended all the same
        logger.warning("the swarm node did not leave in order: %s", str(e) or type(e).__name__)


async def _wait_for_relay(p2p: P2P) -> set[PeerID]:
    """Waits until relays take calls for this peer; returns them. Raises SwarmConnectionError if none does."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_RELAY_TIMEOUT):
            while True:
                visible = await p2p.get_visible_maddrs(latest=True)
                if relays := {relay for maddr in visible if (relay := relay_of(maddr)) is not None}:
                    return relays
                await asyncio.sleep(0.2)
    raise SwarmConnectionError(_NO_RELAY)


async def _keep_meeting(known_peers: KnownPeers) -> None:
    while True:
        await asyncio.sleep(MEETING_PERIOD)
        await known_peers.meet_again()


def split_maddrs(given: str | Iterable[object]) -> list[str]:
    """The multiaddresses in a list, or in a text that separates them by commas or spaces."""
    texts = [given] if isinstance(given, str) else map(str, given)
    return [maddr for text in texts for maddr in re.split(r"[\s,]+", text.strip())]


def check_peer_maddr(maddr: str) -> str:
    """Returns `maddr` if it is the multiaddress of a peer.

    Raises:
        ConfigurationError: it is not, or lacks the peer's id.
    """
    try:
        Multiaddr(maddr)["p2p"]
    except Exception as e:  # multiaddr documents no common base class for its errors
        raise ConfigurationError(
            f"initial_peers: {maddr!r} is not a peer's multiaddress; one looks like /ip4/10.0.0.1/tcp/31337/p2p/Qm… "
            "and is printed by `petals-lightning serve` and `petals-lightning bootstrap`"
        ) from e
    return str(maddr)
