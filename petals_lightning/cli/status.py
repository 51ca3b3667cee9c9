"""`petals-lightning status`: the models of a swarm, their servers, and blocks without a server."""

from __future__ import annotations

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
    from petals_lightning.swarm import SwarmNode

_NUMBERS = {"requests/s": 10, "tokens/s\na block": 8, "cache\nleft": 9, "ms": 6}
"""Columns of numbers, and how many characters each has: with these a table is readable on 80."""

_RUNS = ("kind", "version", "dtype", "quant_type")


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
    """Describes the models of a swarm; a note on stderr says if there are more."""
    from petals_lightning.client.overview import look

    found, listed = look(node, prefixes or (), num_blocks)
    if len(found) < listed:
        print(
            f"{listed} models are listed; these are {len(found)} of them (--dht-prefix NAME shows another)",
            file=sys.stderr,
        )
    return found


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
        trip = server["round_trip"]
        table.add_row(
            server["blocks"],
            " ".join(filter(None, [escape(server["public_name"] or ""), f"…{server['peer_id'][-10:]}"])),
            " ".join(
                [
                    *(escape(server[of]) for of in _RUNS if server[of] not in (None, UNQUANTIZED)),
                    *(f"+{escape(adapter)}" for adapter in server["adapters"]),
                    *(["by a relay"] if server["using_relay"] else []),
                ]
            ),
            f"{server['throughput']:,.1f}",
            *(f"{value:,.0f}" if value is not None else "" for value in (
                server["tokens_per_second"], server["cache_tokens_left"]
            )),
            f"{1000 * trip:,.0f}" if trip is not None else "[red]silent[/]",
        )  # fmt: skip
    return table
