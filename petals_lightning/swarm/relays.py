"""Relays that carry enough.

hivemind's daemon starts libp2p's relay service twice (go-libp2p-daemon, p2pd/main.go). The service of
`ConfigureRelayService` has the daemon's limits, 4 GiB and 30 minutes of a connection; that of `EnableRelayV2` has
libp2p's, 128 KiB and two minutes. The one that starts last answers until the daemon ends. The first runs in a goroutine
of its own (libp2p's `RelayManager`), so on several processors either may be last. `P2PDaemon` gives a relay one
processor, where the goroutine nearly always is. For the rest a relay is asked, by the request with which a peer
reserves a place at it, and is started again while its limit is the small one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_unsigned_varint

from petals_lightning.errors import SwarmConnectionError
from petals_lightning.swarm.daemon import P2PDaemon, RunningDaemon
from petals_lightning.swarm.streams import open_stream

logger = logging.getLogger(__name__)

ENOUGH_BYTES = 1 << 30  # of a connection
_HOP = "/libp2p/circuit/relay/0.2.0/hop"
_RESERVE = b"\x02\x08\x00"  # two bytes follow: field 1, the type, is RESERVE
_LIMIT, _LIMIT_BYTES = 4, 2  # fields of the answer and of the limit in it
_LENGTH_BITS = 16  # of an answer's length: it has some hundred bytes
_ANSWER_TIMEOUT = 5.0  # seconds
_MAX_STARTS = 16


async def start_relay(**options: Any) -> RunningDaemon:
    """Starts a daemon that relays others' calls and carries `ENOUGH_BYTES` of each.

    Args:
        options: of `P2PDaemon`.

    Raises:
        SwarmConnectionError, ConfigurationError: as `P2PDaemon.start` does.
    """
    starts = 0
    while True:
        daemon, starts = await P2PDaemon(**options, is_reachable=True).start(), starts + 1
        try:
            carried = await _asked_from_here(daemon, options)
        except (SwarmConnectionError, OSError) as e:
            logger.warning("this relay cannot be asked how much it carries: %s", str(e) or type(e).__name__)
            return daemon
        except BaseException:
            await daemon.stop()
            raise
        if carried >= ENOUGH_BYTES:
            return daemon
        if starts == _MAX_STARTS:
            logger.warning("this relay cuts each relayed connection after 128 KiB; others should not train through it")
            return daemon
        await daemon.stop()


async def warn_of_short_relays(p2p: P2P, relays: Iterable[PeerID]) -> None:
    """Tells of relays that end a connection before it has carried much: clients then retry again and again."""
    for relay in relays:
        try:
            carried = await carried_bytes(p2p, relay)
        except OSError as e:
            logger.warning("the relay %s does not say how much it carries: %s", relay, str(e) or type(e).__name__)
            continue
        if carried < ENOUGH_BYTES:
            logger.warning(
                "the relay %s cuts each connection after %d KiB: do not serve through it; start it again, as a "
                "`petals-lightning bootstrap`, which sees to that",
                relay,
                carried // 1024,
            )


async def carried_bytes(p2p: P2P, relay: PeerID) -> float:
    """Bytes of a connection that a relay carries in each direction; infinity if it sets no limit.

    The protocol is libp2p's Circuit Relay v2: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md

    Args:
        p2p: a peer that is connected to the relay. The relay keeps a place for it, which expires.
        relay: the peer to ask.

    Raises:
        OSError: the peer is no relay, does not answer, or answers something else.
    """
    async with asyncio.timeout(_ANSWER_TIMEOUT):
        reader, writer = await open_stream(p2p, relay.to_base58(), _HOP)
        try:
            writer.write(_RESERVE)
            await writer.drain()
            return limit_in(await reader.readexactly(await read_unsigned_varint(reader, _LENGTH_BITS)))
        except (EOFError, ValueError) as e:
            raise ConnectionResetError("the relay's answer ends early, or is too long") from e
        finally:
            writer.close()


def limit_in(answer: bytes) -> float:
    """The bytes that a relay's answer allows; infinity if it sets no limit.

    Raises:
        ConnectionResetError: it is no such answer. A stranger's may be anything.
    """
    try:
        limit = _fields(answer).get(_LIMIT, b"")
        found = _fields(limit).get(_LIMIT_BYTES, 0)
    except (DecodeError, TypeError) as e:
        raise ConnectionResetError("the relay's answer cannot be read") from e
    if not isinstance(found, int):
        raise ConnectionResetError("the relay's limit is no number")
    return found or math.inf  # zero is no limit


async def _asked_from_here(relay: RunningDaemon, options: dict[str, Any]) -> float:
    """What a relay on this machine carries. Another daemon must ask, since none calls itself."""
    listens: Sequence[str] = options["host_maddrs"]
    if not options["announce_maddrs"]:  # else these are others' way here, which may not be open from inside
        listens = [str(maddr).split("/p2p/")[0] for maddr in await relay.p2p.get_visible_maddrs(latest=True)]
    here = [f"{maddr.replace('/ip4/0.0.0.0/', '/ip4/127.0.0.1/')}/p2p/{relay.p2p.peer_id}" for maddr in listens]
    asking = P2PDaemon(
        initial_peers=here, host_maddrs=(), announce_maddrs=(), identity_path=None, dht_server=False,
        start_timeout=options["start_timeout"],
    )  # fmt: skip
    daemon = await asking.start()
    try:
        return await carried_bytes(daemon.p2p, relay.p2p.peer_id)
    finally:
        await daemon.stop()


def _fields(message: bytes) -> dict[int, Any]:
    """The fields of a message by number, read without its schema, which hivemind does not ship."""
    return {field.field_number: field.data for field in UnknownFieldSet(Empty.FromString(message))}
