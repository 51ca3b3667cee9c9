"""`petals-lightning status`: which models a swarm serves, by whom, and which blocks nobody holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from petals_lightning.cli.options import InitialPeers
from petals_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from petals_lightning.protocol.records import ServerRecord


def status(
    initial_peers: InitialPeers = None,
    dht_prefix: Annotated[
        list[str] | None, typer.Option(help="Only this model, also if it is not listed; needs --num-blocks then.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of a model that is not listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the models of a swarm and the servers that hold their blocks."""
    if not initial_peers:
        raise ConfigurationError("give --initial-peers MADDR: the address of any peer of the swarm")

    from petals_lightning.swarm import SwarmDirectory, SwarmNode
    from petals_lightning.swarm.directory import ModelEntry

    node = SwarmNode(initial_peers, host_maddrs=(), client_mode=True).start()
    try:
        directory = SwarmDirectory(node.dht)
        models = node.run(directory.models())
        for prefix in dht_prefix or ():
            if num_blocks is not None and prefix not in {entry.dht_prefix for entry in models}:
                models.append(ModelEntry(prefix, num_blocks, None))
        if dht_prefix:
            models = [entry for entry in models if entry.dht_prefix in dht_prefix]
        tables = {entry: node.run(directory.servers(entry.dht_prefix, entry.num_blocks)) for entry in models}
    finally:
        node.close()
    found = [_describe(entry.dht_prefix, entry.repository, table) for entry, table in tables.items()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    if not found:
        console.print("no models are listed in this swarm")
    for model in found:
        console.print(_table(model))


def _describe(prefix: str, repository: str | None, table: list[dict[str, ServerRecord]]) -> dict[str, Any]:
    """Model, its servers, and the blocks without one, in plain types."""
    from petals_lightning.client.routing import format_blocks
    from petals_lightning.protocol.records import ServerState

    held: dict[str, list[int]] = {}
    records: dict[str, ServerRecord] = {}
    for block, servers in enumerate(table):
        for peer, record in servers.items():
            records[peer] = record
            if record.state is ServerState.ONLINE:
                held.setdefault(peer, []).append(block)
    missing = [block for block in range(len(table)) if not any(block in blocks for blocks in held.values())]
    return {
        "dht_prefix": prefix,
        "repository": repository,
        "num_blocks": len(table),
        "missing_blocks": format_blocks(missing),
        "servers": [
            {
                "peer_id": peer,
                "public_name": records[peer].public_name,
                "blocks": format_blocks(blocks),
                "dtype": records[peer].torch_dtype,
                "tokens_per_second": records[peer].tokens_per_second,
                "version": records[peer].version,
            }
            for peer, blocks in sorted(held.items(), key=lambda item: item[1])
        ],
    }


def _table(model: dict[str, Any]) -> Table:
    name = escape(model["repository"] or model["dht_prefix"])  # names are strangers' words
    missing = f"[red]blocks without a server: {model['missing_blocks']}[/]" if model["missing_blocks"] else "complete"
    table = Table(title=f"{name} ({model['num_blocks']} blocks, {missing})", title_justify="left")
    for column in ("blocks", "server", "peer", "dtype", "tokens/s a block", "version"):
        table.add_column(column, justify="right" if column in ("blocks", "tokens/s a block") else "left")
    for server in model["servers"]:
        speed = server["tokens_per_second"]
        table.add_row(
            server["blocks"],
            escape(server["public_name"] or ""),
            f"…{server['peer_id'][-10:]}",
            escape(server["dtype"] or ""),
            f"{speed:,.0f}" if speed else "",
            escape(server["version"] or ""),
        )
    return table
