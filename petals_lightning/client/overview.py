"""A swarm as it is now: its models, which servers hold their blocks, and where it is weak. Plain types, for JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from petals_lightning.client.petals.calls import PetalsCalls
from petals_lightning.client.routing import format_blocks
from petals_lightning.client.stats import TransferStats
from petals_lightning.errors import PeerFailure, SwarmError
from petals_lightning.protocol.records import ServerRecord, ServerState
from petals_lightning.protocol.uids import block_uid
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from petals_lightning.swarm.directory import ModelEntry

_LOOK_SECONDS = 15.0  # for models that no server signs for
_PING_TIMEOUT = 5.0  # seconds
_FEW_TOKENS = 2048  # of conversations: a server with less room than this is nearly full

Description = dict[str, Any]


def look(
    node: SwarmNode,
    prefixes: Sequence[str] = (),
    num_blocks: int | None = None,
    *,
    others: bool = False,
    token: str | None = None,
) -> tuple[list[Description], int]:
    """Describes the models of a swarm. Stops after some seconds: any peer may list any number of names.

    Args:
        node: this process's peer, started.
        prefixes: only these models; none means all.
        num_blocks: of models in `prefixes` that are not listed.
        others: describe all models, those in `prefixes` first.
        token: the swarm's secret, if it has one.

    Returns:
        The models, as docs/api.md describes them, and how many there are.
    """
    directory = SwarmDirectory(node, token)
    models = {entry.dht_prefix: entry for entry in node.run(directory.models())}
    wanted = {prefix: models.pop(prefix, None) for prefix in prefixes}
    if num_blocks is not None:
        wanted = {prefix: entry or ModelEntry(prefix, num_blocks, None) for prefix, entry in wanted.items()}
    entries = [entry for entry in wanted.values() if entry is not None]
    entries += models.values() if others or not prefixes else ()
    found: list[Description] = []
    enough = time.monotonic() + _LOOK_SECONDS
    for entry in entries:
        if time.monotonic() > enough and not entry.is_signed and entry.dht_prefix not in prefixes:
            break
        found.append(node.run(_look_at(node, directory, entry)))
    return found, len(entries)


async def _look_at(node: SwarmNode, directory: SwarmDirectory, entry: ModelEntry) -> Description:
    described = _describe(entry, await directory.servers(entry.dht_prefix, entry.num_blocks))
    await asyncio.gather(*(_call(node, described["dht_prefix"], server) for server in described["servers"]))
    return described


def _describe(entry: ModelEntry, table: list[dict[str, ServerRecord]]) -> Description:
    """Model, how many servers hold each block, and the servers."""
    held: dict[str, list[int]] = {}
    records: dict[str, ServerRecord] = {}
    for block, servers in enumerate(table):
        for peer, record in servers.items():
            records[peer] = record
            if record.state is ServerState.ONLINE:
                held.setdefault(peer, []).append(block)
    coverage = [sum(block in blocks for blocks in held.values()) for block in range(len(table))]
    return {
        "dht_prefix": entry.dht_prefix,
        "repository": entry.repository,
        "num_blocks": len(table),
        "coverage": coverage,
        "missing_blocks": format_blocks([block for block, count in enumerate(coverage) if not count]),
        "servers": [
            _describe_server(peer, records[peer], blocks)
            for peer, blocks in sorted(held.items(), key=lambda item: item[1])
        ],
    }


def _describe_server(peer: str, record: ServerRecord, blocks: list[int]) -> Description:
    return {
        "peer_id": peer,
        "public_name": record.public_name,
        "blocks": format_blocks(blocks),
        "first_block": blocks[0],
        "held_blocks": blocks,
        "kind": "petals" if record.stream_version is None else "petals-lightning",
        "version": record.version,
        "dtype": record.torch_dtype,
        "quant_type": record.quant_type,
        "adapters": list(record.adapters),
        "throughput": record.throughput,
        "tokens_per_second": record.tokens_per_second,
        "cache_tokens_left": record.cache_tokens_left,
        "using_relay": record.using_relay,
    }


async def _call(node: SwarmNode, prefix: str, server: Description) -> None:
    """Adds the seconds to a server and back, and its open requests; None if it does not answer, or does not say."""
    calls = PetalsCalls(node.p2p, server["peer_id"], TransferStats())
    uid = block_uid(prefix, server["first_block"])

    async def ask() -> int | None:
        try:
            return (await calls.info(uid)).open_requests
        except PeerFailure as e:
            if e.code is None:
                raise
            return None  # a refusal is an answer

    server |= {"round_trip": None, "open_requests": None}
    try:
        async with asyncio.timeout(_PING_TIMEOUT):
            await ask()  # the first call also opens the connection
            began = time.perf_counter()
            server["open_requests"] = await ask()
            server["round_trip"] = time.perf_counter() - began
    except (TimeoutError, SwarmError):
        return


def weak_spots(model: Description) -> list[dict[str, str]]:
    """What may fail next in a described model, the worst first: `level` ("error" or "warning") and `text`."""
    servers = model["servers"]
    silent = {server["peer_id"] for server in servers if server["round_trip"] is None}
    holders: list[list[Description]] = [[] for _ in range(model["num_blocks"])]
    for server in servers:
        if server["peer_id"] not in silent:
            for block in server["held_blocks"]:
                holders[block].append(server)
    missing = [block for block, found in enumerate(holders) if not found]
    found: list[tuple[str, str]] = []
    if len(missing) == model["num_blocks"]:
        found.append(("error", "no server answers"))
    elif missing:
        found.append(("error", f"{_blocks(missing)} without a server that answers: the model cannot be used"))
    found += [("error", f"{_name(server)} does not answer") for server in servers if server["peer_id"] in silent]
    for server in servers:
        alone = [
            block
            for block in server["held_blocks"]
            if [each["peer_id"] for each in holders[block]] == [server["peer_id"]]
        ]
        if alone:
            found.append(("warning", f"{_blocks(alone)} only on {_name(server)}"))
    for server in servers:
        left = server["cache_tokens_left"]
        if left is not None and left < _FEW_TOKENS * len(server["held_blocks"]):
            tokens = left // max(len(server["held_blocks"]), 1)
            found.append(("warning", f"{_name(server)} is nearly full: room for {tokens:,} tokens of conversations"))
    return [{"level": level, "text": text} for level, text in found]


def _blocks(blocks: list[int]) -> str:
    return f"block{'s' * (len(blocks) > 1)} {format_blocks(blocks)}"


def _name(server: Description) -> str:
    return server["public_name"] or f"…{server['peer_id'][-10:]}"
