"""Training and decoding over slow links, with and without what saves bytes and trips.

    python -m benchmarks.slow_link                       # 100 Mbit/s and 50 ms round trip
    python -m benchmarks.slow_link --block-us 10         # servers whose blocks take 10 µs a position
    python -m benchmarks.slow_link --round-trip 0.1 --mbits 20

Every server stands behind a TCP proxy that delays and throttles what passes. Each server has a link of its own, and so
has the client, which all its connections share. Comparisons, each from one run, rounds of both sides alternating,
medians compared (Llama of hidden 512 and 8 blocks, random; activations travel in float32, where nothing else is said):

- a training step through chains of servers, our streams against Petals' methods on the same kind of servers: there the
  prefix is in every sample, all positions are sent and fetched, inputs and prompts are sent again for the backward,
  which computes the forward again, and the client stands between all servers; in micro-batches cut for it as for ours,
  and in as few as Petals makes (of 1,024 positions: our client sends such servers no more either); once with ours in
  bfloat16 on the wire;
- a training step, and decoding, with servers handing over to each other and without.

Servers compute with real blocks, or with blocks that take a stated time (`throttled_server`).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer

from benchmarks.decode import generate
from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.swarm import PREFIX, PROGRAM, batch_of, save_random_llama, start_server, training_rounds
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from tests.faults.proxy import SharedLink, TcpProxy, free_port

BLOCKS = 8


@contextmanager
def slow_chain(
    model: str, count: int, *options: str, program: tuple[str, ...], threads: int, delay: float, rate: float
) -> Iterator[str]:
    """Servers with links of their own, and a link for whoever connects to them when all are up; gives an address.

    Args:
        delay: seconds one way.
        rate: bytes a second in each direction of a link.
    """
    with ExitStack() as stack:
        proxies: list[TcpProxy] = []
        first = ""
        for number in range(count):
            port = free_port()
            proxy = TcpProxy(port)
            stack.callback(proxy.close)
            proxies.append(proxy)
            # From the start: peers measure their round trip early, and take their windows from it.
            proxy.delay, proxy.link = delay, SharedLink(rate)
            process, maddr = start_server(
                model, threads, "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}",
                "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{proxy.port}", *options,
                "--block-indices", f"{BLOCKS * number // count}:{BLOCKS * (number + 1) // count}",
                join=("--initial-peers", first) if first else ("--new-swarm",), program=program,
            )  # fmt: skip
            stack.callback(_end, process)
            first = first or f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{maddr.split('/p2p/')[1]}"
        of_client = SharedLink(rate)
        for proxy in proxies:
            proxy.link = of_client
        yield first


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()


def main(
    case: Annotated[str, typer.Option(help="batch×tokens×P of the training steps")] = "16x64x16",
    mbits: Annotated[float, typer.Option(help="of each link and direction, in Mbit/s")] = 100.0,
    round_trip: Annotated[float, typer.Option(help="seconds to a server and back")] = 0.05,
    servers: Annotated[str, typer.Option(help="lengths of the chains, comma separated")] = "1,2,4",
    block_us: Annotated[
        float | None, typer.Option(help="µs that a block takes for a position", show_default="real blocks")
    ] = None,
    new_tokens: int = 16,
    repeats: int = 7,
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per comparison."""
    torch.set_num_threads(threads)
    batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
    batch, prompt, rows = batch_of(batch_size, tokens), torch.randint(1, 1000, (1, 16)), []
    program = PROGRAM
    if block_us is not None:
        program = "benchmarks.throttled_server", str(block_us)
    start = partial(slow_chain, program=program, threads=threads, delay=round_trip / 2, rate=mbits * 1e6 / 8)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=512, blocks=BLOCKS, dtype="float32", is_thin=block_us is not None)
        for count in (int(part) for part in servers.split(",")):
            with ExitStack() as stack:
                ours = stack.enter_context(start(folder, count))
                petals = stack.enter_context(start(folder, count, "--petals-only"))

                def load(auto_class: Any, maddr: str, stack: ExitStack = stack, **options: Any) -> Any:
                    options = {"wire_dtype": "float32", **options}
                    model = auto_class.from_pretrained(folder, initial_peers=[maddr], dht_prefix=PREFIX, **options)
                    stack.callback(remote_blocks(model).close)
                    return model

                classifier = partial(
                    load, AutoDistributedModelForSequenceClassification,
                    tuning_mode="deep_ptune", pre_seq_len=pre_seq_len, num_labels=2,
                )  # fmt: skip
                models = {"ours": classifier(ours), "petals": classifier(petals)}
                models["petals, coarse"] = classifier(petals, min_microbatch_tokens=batch_size * tokens)
                models["16 bit"] = classifier(ours, wire_dtype="bfloat16")
                ways = {"ours": {}, "direct": {"server_to_server": False}} if count > 1 else {}
                if ways:
                    models["direct"] = classifier(ours, server_to_server=False)
                seconds = alternate(training_rounds(models, batch), repeats)
                name = f"training step, {count} server{'s' * (count > 1)}"
                rows.append((f"{name}: ours, Petals' methods", seconds["ours"], seconds["petals"]))
                rows.append((f"{name}: ours, Petals' methods and cuts", seconds["ours"], seconds["petals, coarse"]))
                rows.append((f"{name}: ours in bfloat16, Petals' methods", seconds["16 bit"], seconds["petals"]))
                if not ways:
                    continue
                rows.append((f"{name}: handed over, direct", seconds["ours"], seconds["direct"]))
                talkers = {n: load(AutoDistributedModelForCausalLM, ours, **way) for n, way in ways.items()}
                decoding = {n: lambda m=m: generate(m, prompt, new_tokens) / new_tokens for n, m in talkers.items()}
                seconds = alternate(decoding, max(repeats // 2, 2))
                rows.append((f"decoded token, {count} servers: handed over, direct", *seconds.values()))
    blocks = "real blocks" if block_us is None else f"blocks of {block_us:g} µs a position"
    print_table(
        f"{mbits:g} Mbit/s, {round_trip * 1e3:g} ms round trip, 512 × {BLOCKS} in float32, {blocks}, {case}",
        ("first ms", "second ms", "second / first"),
        [(name, ours * 1e3, other * 1e3) for name, ours, other in rows],
        second_by_first=True,
    )
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
