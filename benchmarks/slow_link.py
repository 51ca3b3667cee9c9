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

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks import throttled_server
from benchmarks.decode import generate
from benchmarks.options import Case, Chains, Mbits, Output, RoundTrip, parse_case, parse_numbers
from benchmarks.rounds import Row, alternate, report
from benchmarks.servers import Program, Span, even_spans, running_server
from benchmarks.swarm import PREFIX, batch_of, save_random_llama, training_rounds
from petals_lightning.cli.main import main as serve
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from tools.testing.proxy import SharedLink, TcpProxy, free_port


@contextmanager
def slow_chain(
    model: str, spans: Sequence[Span], *extra: str, program: Program = serve, threads: int, delay: float, rate: float
) -> Iterator[str]:
    """Servers with links of their own, and a link for whoever connects to them when all are up; gives an address.

    Args:
        delay: seconds one way.
        rate: bytes a second in each direction of a link.
    """
    with ExitStack() as stack:
        proxies: list[TcpProxy] = []
        first: list[str] = []
        for span in spans:
            port = free_port()
            proxy = TcpProxy(port)
            stack.callback(proxy.close)
            proxies.append(proxy)
            # From the start: peers measure their round trip early, and take their windows from it.
            proxy.delay, proxy.link = delay, SharedLink(rate)
            addresses = (
                "--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}",
                "--announce-maddrs", f"/ip4/127.0.0.1/tcp/{proxy.port}",
            )  # fmt: skip
            server = stack.enter_context(
                running_server(model, threads, *addresses, *extra, span=span, join=first, program=program)
            )
            first = first or [f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{server.peer_id}"]
        of_client = SharedLink(rate)
        for proxy in proxies:
            proxy.link = of_client
        yield first[0]


def in_ms(seconds: dict[str, float], tokens: int = 1) -> dict[str, float]:
    """Milliseconds of a round, or of each of its tokens."""
    return {side: taken * 1e3 / tokens for side, taken in seconds.items()}


def main(
    case: Case = "16x64x16",
    mbits: Mbits = 100.0,
    round_trip: RoundTrip = 0.05,
    servers: Chains = "1,2,4",
    block_us: Annotated[
        float | None, typer.Option(help="µs that a block takes for a position", show_default="real blocks")
    ] = None,
    hidden: int = 512,
    blocks: int = 8,
    new_tokens: int = 16,
    repeats: int = 7,
    threads: int = 2,
    output: Output = None,
) -> None:
    """Prints a row per comparison."""
    torch.set_num_threads(threads)
    batch_size, tokens, pre_seq_len = parse_case(case)
    batch, prompt = batch_of(batch_size, tokens), torch.randint(1, 1000, (1, 16))
    rows: list[Row] = []
    program = serve if block_us is None else partial(throttled_server.serve, block_us)
    start = partial(slow_chain, program=program, threads=threads, delay=round_trip / 2, rate=mbits * 1e6 / 8)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32", is_thin=block_us is not None)
        for count in parse_numbers(servers):
            with ExitStack() as stack:
                ours = stack.enter_context(start(folder, even_spans(blocks, count)))
                petals = stack.enter_context(start(folder, even_spans(blocks, count), "--petals-only"))

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
                if count > 1:
                    models["direct"] = classifier(ours, server_to_server=False)
                step = in_ms(alternate(training_rounds(models, batch), repeats))
                name = f"training step, {count} server{'s' * (count > 1)}"
                rows.append((f"{name}: ours, Petals' methods", step["ours"], step["petals"]))
                rows.append((f"{name}: ours, Petals' methods and cuts", step["ours"], step["petals, coarse"]))
                rows.append((f"{name}: ours in bfloat16, Petals' methods", step["16 bit"], step["petals"]))
                if count == 1:
                    continue
                rows.append((f"{name}: handed over, direct", step["ours"], step["direct"]))
                talkers = {
                    "ours": load(AutoDistributedModelForCausalLM, ours),
                    "direct": load(AutoDistributedModelForCausalLM, ours, server_to_server=False),
                }
                decoding = {name: partial(generate, model, prompt, new_tokens) for name, model in talkers.items()}
                token = in_ms(alternate(decoding, max(repeats // 2, 2)), new_tokens)
                rows.append((f"decoded token, {count} servers: handed over, direct", token["ours"], token["direct"]))
    kind = "real blocks" if block_us is None else f"blocks of {block_us:g} µs a position"
    report(
        f"{mbits:g} Mbit/s, {round_trip * 1e3:g} ms round trip, {hidden} × {blocks} in float32, {kind}, {case}",
        ("first ms", "second ms", "second / first"),
        rows,
        output,
        second_by_first=True,
    )


if __name__ == "__main__":
    typer.run(main)
