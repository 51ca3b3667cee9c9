"""Throughput of one server under 1, 2, 4 and 8 clients that train at once.

    python -m benchmarks.clients
    python -m benchmarks.clients --counts 1,8 --seconds 60

Every client is a process of its own with one compute thread, as the server has one: of two cores the server keeps one
busy and the clients share the other, so it is the server that is measured, not the clients' arithmetic. All clients of
a round begin at once and count the samples that they have trained on when its time is over; rounds of all counts
alternate, and medians are compared: all clients together with one client, and the slowest with an even share.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Annotated

import typer

from benchmarks.options import Case, Output, parse_case, parse_numbers
from benchmarks.rounds import report
from benchmarks.servers import running_server
from benchmarks.swarm import save_random_llama
from benchmarks.training_client import Client


def run_round(clients: list[Client], seconds: float) -> list[float]:
    """Steps a second of each client."""
    until = time.time() + seconds
    for client in clients:
        client.start(until)
    return [client.done()[0] / seconds for client in clients]


def main(
    counts: Annotated[str, typer.Option(help="numbers of clients, comma separated; the first is the reference")] = (
        "1,2,4,8"
    ),
    case: Case = "16x64x16",
    seconds: Annotated[float, typer.Option(help="of each round")] = 20.0,
    hidden: int = 512,
    blocks: int = 8,
    repeats: int = 3,
    threads: Annotated[int, typer.Option(help="of the server")] = 1,
    output: Output = None,
) -> None:
    """Prints two rows per number of clients."""
    numbers, samples = parse_numbers(counts), parse_case(case)[0]
    rounds: dict[int, list[list[float]]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32")
        maddr = stack.enter_context(running_server(folder, threads)).maddr
        clients = [Client(folder, maddr, case) for _ in range(max(numbers))]
        for client in clients:
            stack.callback(client.close)
        for client in clients:
            client.wait_until_ready()
        for _ in range(repeats):
            for number in numbers:
                rounds[number].append(run_round(clients[:number], seconds))
    together = {number: samples * statistics.median(map(sum, found)) for number, found in rounds.items()}
    rows = []
    for number, found in rounds.items():
        even = together[number] / number
        slowest = even * statistics.median(min(rates) / statistics.mean(rates) for rates in found)
        rows.append((f"{number} clients together, against the first row", together[number], together[numbers[0]]))
        rows.append((f"the slowest of {number}, against an even share", slowest, even))
    title = f"samples/s, steps of {case}, Llama {hidden} × {blocks}, float32, server of {threads} threads, clients of 1"
    report(title, ("samples/s", "reference", "ratio"), rows, output)


if __name__ == "__main__":
    typer.run(main)
