"""`petals-lightning status`: the models of a swarm, their servers, and blocks without a server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from petals_lightning.cli.options import InitialPeers
from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.quant_types import UNQUANTIZED

if TYPE_CHECKING:
    from petals_lightning.protocol.records import ServerRecord
    from petals_lightning.swarm import SwarmDirectory, SwarmNode
    from petals_lightning.swarm.directory import ModelEntry

_LOOK_SECONDS = 15.0  # for models that no server signs for
_PING_TIMEOUT = 5.0  # seconds
_NUMBERS = {"requests/s": 10, "tokens/s\na block": 8, "cache\nleft": 9, "ms": 6}
"""Columns of numbers, and how many characters each has: with these a table is readable on 80."""

_RUNS = ("kind", "version", "dtype", "quant_type")

Server = dict[str, Any]


def status(
    initial_peers: InitialPeers = None,
    dht_prefix: Annotated[
        list[str] | None, typer.Option(help="Only this model, also if it is not listed; needs --num-blocks then.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of a model that is not listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    watch: Annotated[
        float | None, typer.Option(help="Look again every so many seconds, until Ctrl-C.", metavar="SECONDS")
    ] = None,
) -> None:
    """Show the models of a swarm and the servers that hold their blocks; the public Petals network by default."""
    if watch is not None and not watch > 0:
        raise ConfigurationError(f"--watch is {watch:g}: it must be above 0 seconds")

    from petals_lightning.swarm import PUBLIC_INITIAL_PEERS, SwarmNode

    node = SwarmNode(initial_peers or PUBLIC_INITIAL_PEERS, host_maddrs=(), client_mode=True).start()
    try:
        found = _look(node, dht_prefix, num_blocks)
        if watch is None:
            print(json.dumps(found, indent=2)) if as_json else Console().print(_tables(found))
            return
        with nullcontext() if as_json else Live(_tables(found), auto_refresh=False) as live:
            while True:
                if live is None:
                    print(json.dumps(found), flush=True)
                else:
                    live.update(_tables(found), refresh=True)
                time.sleep(watch)
                found = _look(node, dht_prefix, num_blocks)
    except KeyboardInterrupt:
        return
    finally:
        node.close()


def _look(node: SwarmNode, prefixes: list[str] | None, num_blocks: int | None) -> list[dict[str, Any]]:
    """Describes the models of a swarm. Stops after some seconds: any peer may list any number of names."""
    from petals_lightning.swarm import SwarmDirectory
    from petals_lightning.swarm.directory import ModelEntry

    directory = SwarmDirectory(node)
    models = {entry.dht_prefix: entry for entry in node.run(directory.models())}
    for prefix in prefixes or ():
        if num_blocks is not None:
            models.setdefault(prefix, ModelEntry(prefix, num_blocks, None))
    if prefixes:
        models = {prefix: entry for prefix, entry in models.items() if prefix in prefixes}
    found: list[dict[str, Any]] = []
    enough = time.monotonic() + _LOOK_SECONDS
    for entry in models.values():
        if time.monotonic() > enough and not entry.is_signed:
            print(
                f"{len(models)} models are listed; these are {len(found)} of them (--dht-prefix NAME shows another)",
                file=sys.stderr,
            )
            break
        found.append(node.run(_look_at(node, directory, entry)))
    return found


async def _look_at(node: SwarmNode, directory: SwarmDirectory, entry: ModelEntry) -> dict[str, Any]:
    described = _describe(entry, await directory.servers(entry.dht_prefix, entry.num_blocks))
    trips = await _round_trips(node, described)
    for server in described["servers"]:
        server["round_trip"] = trips[server["peer_id"]]
    return described


def _describe(entry: ModelEntry, table: list[dict[str, ServerRecord]]) -> dict[str, Any]:
    """Model, how many servers hold each block, and the servers, in plain types."""
    from petals_lightning.client.routing import format_blocks
    from petals_lightning.protocol.records import ServerState

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
            _describe_server(peer, records[peer], format_blocks(blocks), blocks[0])
            for peer, blocks in sorted(held.items(), key=lambda item: item[1])
        ],
    }


def _describe_server(peer: str, record: ServerRecord, blocks: str, first: int) -> Server:
    return {
        "peer_id": peer,
        "public_name": record.public_name,
        "blocks": blocks,
        "first_block": first,
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


async def _round_trips(node: SwarmNode, model: dict[str, Any]) -> dict[str, float | None]:
    """Seconds to every server and back, None where it does not answer."""
    from petals_lightning.client.petals.calls import PetalsCalls
    from petals_lightning.client.stats import TransferStats
    from petals_lightning.errors import SwarmError
    from petals_lightning.protocol.uids import block_uid

    async def measure(server: Server) -> float | None:
        calls = PetalsCalls(node.p2p, server["peer_id"], TransferStats())
        uid = block_uid(model["dht_prefix"], server["first_block"])
        try:
            async with asyncio.timeout(_PING_TIMEOUT):
                await calls.info(uid)  # the first call also opens the connection
                began = time.perf_counter()
                await calls.info(uid)
                return time.perf_counter() - began
        except (TimeoutError, SwarmError):
            return None

    trips = await asyncio.gather(*map(measure, model["servers"]))
    return {server["peer_id"]: trip for server, trip in zip(model["servers"], trips, strict=True)}


def _tables(found: list[dict[str, Any]]) -> Group:
    return Group(*(map(_table, found) if found else ["no models are listed in this swarm"]))


def _table(model: dict[str, Any]) -> Table:
    name, holders = model["repository"] or model["dht_prefix"], min(model["coverage"], default=0)
    state = f"every block on {holders} server{'s' if holders != 1 else ''} or more"
    if model["missing_blocks"]:
        state = f"[red]blocks without a server: {model['missing_blocks']}[/]"
    # Strangers choose the names.
    table = Table(
        title=f"{escape(name)} ({model['num_blocks']} blocks, {state})", title_justify="left", box=SIMPLE, padding=0,
        collapse_padding=True, pad_edge=False,
    )  # fmt: skip
    table.add_column("blocks", justify="right", min_width=6, overflow="fold")
    table.add_column("server", overflow="fold")
    table.add_column("runs", min_width=16, overflow="fold")
    for column, width in _NUMBERS.items():
        table.add_column(column, justify="right", width=width)
    for server in model["servers"]:
        trip, way = server["round_trip"], "by a relay" if server["using_relay"] else ""
        table.add_row(
            server["blocks"],
            " ".join(filter(None, [escape(server["public_name"] or ""), f"…{server['peer_id'][-10:]}"])),
            " ".join(filter(None, [*(escape(server[of]) for of in _RUNS if server[of] not in (None, UNQUANTIZED)), way]))
            + "".join(f" +{escape(adapter)}" for adapter in server["adapters"]),
            f"{server['throughput']:,.1f}",
            *(f"{value:,.0f}" if value is not None else "" for value in (
                server["tokens_per_second"], server["cache_tokens_left"]
            )),
            f"{1000 * trip:,.0f}" if trip is not None else "[red]silent[/]",
        )  # fmt: skip
    return table
