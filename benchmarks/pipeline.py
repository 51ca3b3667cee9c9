"""How full the pipeline through a chain of servers is: a training step against the ideal one.

    python -m benchmarks.pipeline                            # 2 and 4 servers, 8 micro-batches
    python -m benchmarks.pipeline --servers 4 --block-ms 5

Servers are processes whose blocks take a stated time (`throttled_server`), so that they behave like machines of their
own on whatever cores there are. With k servers, m micro-batches and t seconds for one of them on one server, a forward
takes (m + k - 1)·t at best, and so does a backward; t is the stated time of the samples, so what the prefix costs
counts as a loss, as do the client's own work, the wire, and whatever waits. Rounds of all ways alternate in one run.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer

from benchmarks.decode import start_chain
from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.swarm import PREFIX, batch_of, save_random_llama, training_rounds
from petals_lightning.client import ClientConfig
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks


def end_all(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def main(
    servers: Annotated[str, typer.Option(help="lengths of the chains, comma separated")] = "2,4",
    case: Annotated[str, typer.Option(help="batch×tokens×P")] = "32x64x16",
    microbatches: Annotated[int, typer.Option(help="that the batch is cut into; they must go into it evenly")] = 8,
    block_ms: Annotated[float, typer.Option(help="stated time of one block for the samples of a micro-batch")] = 20.0,
    blocks: int = 8,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per chain and way."""
    torch.set_num_threads(1)
    batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
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
    batch, rows = batch_of(batch_size, tokens), []
    throttled = "benchmarks.throttled_server", str(block_ms * 1e3 / (samples * tokens))
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=512, blocks=blocks, dtype="float32", is_thin=True)
        for count in (int(part) for part in servers.split(",")):
            with ExitStack() as stack:
                spans = [(blocks * part // count, blocks * (part + 1) // count) for part in range(count)]
                processes, maddr = start_chain(folder, spans, 1, throttled)
                stack.callback(end_all, processes)
                models = {
                    name: AutoDistributedModelForSequenceClassification.from_pretrained(
                        folder, initial_peers=[maddr], dht_prefix=PREFIX, tuning_mode="deep_ptune", num_labels=2,
                        pre_seq_len=pre_seq_len, client_config=ClientConfig(**config),
                    )
                    for name, config in ways.items()
                }  # fmt: skip
                for model in models.values():
                    stack.callback(remote_blocks(model).close)
                seconds = alternate(training_rounds(models, batch), repeats)
                stage = block_ms * 1e-3 * blocks / count
                ideal = 2 * (microbatches + count - 1) * stage
                rows += [(f"{count} servers, {name}", ideal, taken) for name, taken in seconds.items()]
    print_table(
        f"training step of {case}, {microbatches} micro-batches, {blocks} blocks of {block_ms:g} ms",
        ("ideal ms", "step ms", "ideal / step"),
        [(name, ideal * 1e3, taken * 1e3) for name, ideal, taken in rows],
    )
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
