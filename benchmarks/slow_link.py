"""Training and decoding over slow links, with and without what saves bytes and trips.

    python -m benchmarks.slow_link                       # 100 Mbit/s and 50 ms round trip
    python -m benchmarks.slow_link --round-trip 0.1 --mbits 20

Every server stands behind a TCP proxy that delays and throttles what passes, for the client and for the other servers
alike. Three comparisons, each from one run, rounds of both sides alternating, medians compared (a random Llama of
hidden 512 and 8 blocks, float32):

- a training step through one server, our stream against Petals' methods on the same server: the prefix in every sample,
  all positions sent and fetched, inputs and prompts sent again for the backward, which computes the forward again;
- a training step, and decoding, through a chain, with servers handing over to each other and without.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer

from benchmarks.decode import generate
from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.swarm import PREFIX, batch_of, classifier, optimizer_of, run_step, save_random_llama, start_server
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from tests.faults.proxy import TcpProxy, free_port


@dataclass
class Link:
    """What every proxy does to what passes: `delay` seconds one way, `rate` bytes a second."""

    delay: float
    rate: float

    def start_server(
        self, stack: ExitStack, model: str, threads: int, *options: str, peers: tuple[str, ...] = ()
    ) -> str:
        """A server behind a proxy of its own; returns the address at which others reach it."""
        port = free_port()
        proxy = TcpProxy(port)
        stack.callback(proxy.close)
        join = ("--initial-peers", *peers) if peers else ("--new-swarm",)
        process, maddr = start_server(
            model, threads, "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}",
            "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{proxy.port}", *options, join=join,
        )  # fmt: skip
        stack.callback(_end, process)
        proxy.delay, proxy.rate = self.delay, self.rate
        return f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{maddr.split('/p2p/')[1]}"


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def training(models: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], float]]:
    def round_of(model: torch.nn.Module) -> Callable[[], float]:
        optimizer = optimizer_of(model)
        return lambda: run_step(model, optimizer, batch)

    return {name: round_of(model) for name, model in models.items()}


def main(
    case: Annotated[str, typer.Option(help="batch×tokens×P of the training steps")] = "16x64x16",
    mbits: Annotated[float, typer.Option(help="of each connection and direction, in Mbit/s")] = 100.0,
    round_trip: Annotated[float, typer.Option(help="seconds from the client to a server and back")] = 0.05,
    servers: Annotated[int, typer.Option(help="of the chain")] = 4,
    new_tokens: int = 16,
    repeats: int = 7,
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per comparison."""
    torch.set_num_threads(threads)
    batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
    batch, prompt = batch_of(batch_size, tokens), torch.randint(1, 1000, (1, 16))
    link, blocks, rows = Link(round_trip / 2, mbits * 1e6 / 8), 8, []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=512, blocks=blocks, dtype="float32")
        with ExitStack() as stack:  # two swarms of one server each
            models = {
                "ours": classifier(folder, link.start_server(stack, folder, threads), pre_seq_len),
                "other": classifier(folder, link.start_server(stack, folder, threads, "--petals-only"), pre_seq_len),
            }
            seconds = alternate(training(models, batch), repeats)
            rows.append(("training step, 1 server: our stream, Petals' methods", seconds["ours"], seconds["other"]))
            for model in models.values():
                remote_blocks(model).close()
        with ExitStack() as stack:
            peers: tuple[str, ...] = ()
            for number in range(servers):
                span = f"{blocks * number // servers}:{blocks * (number + 1) // servers}"
                maddr = link.start_server(stack, folder, threads, "--block-indices", span, peers=peers)
                peers = peers or (maddr,)
            ways = {"ours": {"server_to_server": True}, "other": {"server_to_server": False}}
            models = {name: classifier(folder, peers[0], pre_seq_len, **way) for name, way in ways.items()}
            seconds = alternate(training(models, batch), repeats)
            rows.append((f"training step, {servers} servers: handed over, direct", seconds["ours"], seconds["other"]))
            talkers = {
                name: AutoDistributedModelForCausalLM.from_pretrained(
                    folder, initial_peers=list(peers), dht_prefix=PREFIX, **way
                )
                for name, way in ways.items()
            }
            decoding = {n: lambda m=m: generate(m, prompt, new_tokens) / new_tokens for n, m in talkers.items()}
            seconds = alternate(decoding, max(repeats // 2, 2))
            rows.append((f"decoded token, {servers} servers: handed over, direct", seconds["ours"], seconds["other"]))
            for model in [*models.values(), *talkers.values()]:
                remote_blocks(model).close()
    print_table(
        f"{mbits:g} Mbit/s, {round_trip * 1e3:g} ms round trip, Llama 512 × {blocks}, float32, {case}",
        ("first ms", "second ms", "second / first"),
        [(name, ours * 1e3, other * 1e3) for name, ours, other in rows],
        second_by_first=True,
    )
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
