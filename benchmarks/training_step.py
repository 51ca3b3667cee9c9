"""Time and bytes of a training step: through one server on loopback, and in one local process with plain Hugging Face.

    python -m benchmarks.training_step                       # the grid of docs/performance.md
    python -m benchmarks.training_step --cases 32x24x16 --dtype bfloat16 --repeats 30
    python -m benchmarks.training_step --device cuda --dtype bfloat16 --hidden 4096 --blocks 16

Both sides train the same prompts and head of the same random Llama (hidden 512, 8 blocks unless said otherwise); their
steps are interleaved in one run and medians compared, since the machine may be noisy. The local side concatenates the
prefix to every sample. The server is a process of its own with as many threads as the local side.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import save_rows
from benchmarks.swarm import batch_of, classifier, optimizer_of, run_step, running_server, save_random_llama
from petals_lightning.models import remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification


def main(
    cases: Annotated[str, typer.Option(help="batch×tokens×P, comma separated")] = "16x64x16,32x24x16,8x256x16,16x16x16",
    hidden: int = 512,
    blocks: int = 8,
    dtype: str = "float32",
    tuning_mode: str = "deep_ptune",
    repeats: int = 15,
    threads: int = 2,
    device: Annotated[str, typer.Option(help="Of both sides, and of the server.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per case: seconds of both sides, their ratio, bytes on the streams."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype=dtype)
        with running_server(folder, threads, "--device", device) as (_, maddr):
            for case in cases.split(","):
                batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
                options = {"tuning_mode": tuning_mode, "pre_seq_len": pre_seq_len, "num_labels": 2}
                remote = classifier(folder, maddr, **options)
                local = LocalModelForSequenceClassification.from_pretrained(folder, **options)
                models = {"swarm": remote.to(device), "local": local.to(device)}
                optimizers = {name: optimizer_of(model) for name, model in models.items()}
                seconds: dict[str, list[float]] = {"swarm": [], "local": []}
                stats, batch = remote_blocks(remote).stats, batch_of(batch_size, tokens, device)
                for repeat in range(repeats + 2):
                    before = stats.bytes_sent, stats.bytes_received
                    for name, model in models.items():
                        elapsed = run_step(model, optimizers[name], batch)
                        if repeat >= 2:
                            seconds[name].append(elapsed)
                    moved = stats.bytes_sent - before[0], stats.bytes_received - before[1]
                remote_blocks(remote).close()
                medians = {name: statistics.median(values) for name, values in seconds.items()}
                rows.append(
                    {
                        "case": case, "swarm_seconds": medians["swarm"], "local_seconds": medians["local"],
                        "ratio": medians["swarm"] / medians["local"], "bytes_sent": moved[0],
                        "bytes_received": moved[1],
                    }
                )  # fmt: skip
    table = Table(
        title=f"training step, Llama {hidden} × {blocks}, {dtype}, {tuning_mode}, {device}, {threads} threads"
    )
    for column in ("batch×tokens×P", "swarm ms", "local ms", "swarm / local", "MB sent", "MB received", "MB"):
        table.add_column(column, justify="right")
    for row in rows:
        sent, received = row["bytes_sent"] / 1e6, row["bytes_received"] / 1e6
        table.add_row(
            row["case"], f"{row['swarm_seconds'] * 1e3:.0f}", f"{row['local_seconds'] * 1e3:.0f}",
            f"{row['ratio']:.2f}", f"{sent:.2f}", f"{received:.2f}", f"{sent + received:.2f}",
        )  # fmt: skip
    Console().print(table)
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
