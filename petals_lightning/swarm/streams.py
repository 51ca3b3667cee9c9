"""Opens a raw stream to another peer.

Replaces `hivemind.P2P.call_binary_stream_handler`, which leaks its socket to the daemon when the other peer cannot be
reached (1.1.12): every try to reach a dead server would cost a file descriptor.
"""

from __future__ import annotations

import asyncio

from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2


async def open_stream(p2p: P2P, peer: str, method: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a bidirectional stream to `method` of a peer, given by its base58 id.

    Raises:
        ConnectionError: the peer cannot be reached or does not know the method.
    """
    try:
        reader, writer = await p2p._client.control.daemon_connector.open_connection()
    except (P2PDaemonError, OSError) as e:
        raise ConnectionError(f"the libp2p daemon does not answer: {e}") from e
    try:
        open_request = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer).to_bytes(), proto=[method])
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=open_request))
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
    except BaseException as e:
        writer.close()
        if isinstance(e, (ControlFailure, OSError, EOFError)):
            lines = str(e).strip().splitlines()
            raise ConnectionError(lines[-1].strip(" *")[:200] if lines else type(e).__name__) from e
        raise
    return reader, writer
