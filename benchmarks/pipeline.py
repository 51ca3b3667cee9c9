"""How full the pipeline through a chain of servers is: a training step against the ideal one.

    python -m benchmarks.pipeline                            # 2 and 4 servers, 8 micro-batches
    python -m benchmarks.pipeline --servers 4 --block-ms 5

Servers are processes whose blocks take a stated time (`throttled_server`), so that they behave like machines of their
own on whatever cores there are. With k servers, m micro-batches and t seconds for one of them on one server, a forward
takes (m + k - 1)·t at best, and so does a backward; t is the stated time of the samples, so what the prefix costs
counts as a loss, as do the client's own work, the wire, and whatever waits. Rounds of all ways alternate in one run.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks import throttled_server
from benchmarks.options import Case, Chains, Output, parse_case, parse_numbers
from benchmarks.rounds import Row, alternate, report
from benchmarks.servers import even_spans, running_chain
from benchmarks.swarm import batch_of, classifier, save_random_llama, training_rounds
from petals_lightning.client import ClientConfig
from petals_lightning.models import remote_blocks


def main(
    servers: Chains = "2,4",
    case: Case = "32x64x16",
    microbatches: Annotated[int, typer.Option(help="that the batch is cut into; they must go into it evenly")] = 8,
    block_ms: Annotated[float, typer.Option(help="stated time of one block for the samples of a micro-batch")] = 20.0,
    hidden: int = 512,
    blocks: int = 8,
    repeats: int = 5,
    output: Output = None,
) -> None:
    """Prints a row per chain and way."""
    torch.set_num_threads(1)
    batch_size, tokens, pre_seq_len = parse_case(case)
    samples = batch_size // microbatches
    pinned = {
        "min_microbatch_tokens": samples * tokens,
        "max_microbatch_tokens": samples * (tokens + pre_seq_len),
    }
    ways: dict[str, dict[str, Any]] = {
        f"{microbatches}, handed over": pinned,
        f"{microbatches}, direct": pinned | {"server_to_server": False},
        "as sized, handed over": {},
        "as sized, direct": {"server_to_server": False},
    }
    batch = batch_of(batch_size, tokens)
    rows: list[Row] = []
    throttled = partial(throttled_server.serve, block_ms * 1e3 / (samples * tokens))
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32", is_thin=True)
        for count in parse_numbers(servers):
            with ExitStack() as stack:
                chain = running_chain(folder, even_spans(blocks, count), 1, program=throttled)
                maddr = stack.enter_context(chain)
                models = {
                    name: classifier(folder, maddr, pre_seq_len, client_config=ClientConfig(**config))
                    for name, config in ways.items()
                }
                for model in models.values():
                    stack.callback(remote_blocks(model).close)
                seconds = alternate(training_rounds(models, batch), repeats)
                stage = block_ms * 1e-3 * blocks / count
                ideal = 2 * (microbatches + count - 1) * stage
                rows += [(f"{count} servers, {name}", ideal * 1e3, taken * 1e3) for name, taken in seconds.items()]
    report(
        f"training step of {case}, {microbatches} micro-batches, {blocks} blocks of {block_ms:g} ms",
        ("ideal ms", "step ms", "ideal / step"),
        rows,
        output,
    )


if __name__ == "__main__":
    typer.run(main)
