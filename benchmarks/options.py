"""Options that several benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Case = Annotated[str, typer.Option(help="batch×tokens×P of a training step")]
Cases = Annotated[str, typer.Option(help="batch×tokens×P of training steps, comma separated")]
Chains = Annotated[str, typer.Option(help="lengths of the chains of servers, comma separated")]
Device = Annotated[str, typer.Option(help="Of both sides, and of the servers.")]
Mbits = Annotated[float, typer.Option(help="of each link and direction, in Mbit/s")]
RoundTrip = Annotated[float, typer.Option(help="seconds to a server and back")]
Output = Annotated[Path | None, typer.Option(help="Save the rows as JSON.")]


def parse_case(case: str) -> tuple[int, int, int]:
    """Batch, tokens and P of "16x64x16"."""
    batch, tokens, pre_seq_len = (int(part) for part in case.split("x"))
    return batch, tokens, pre_seq_len


def parse_numbers(numbers: str) -> list[int]:
    """Of "1,2,4"."""
    return [int(part) for part in numbers.split(",")]
