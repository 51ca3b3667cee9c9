"""Time and bytes of a training step: through one server on loopback, and in one local process with plain Hugging Face.

    python -m benchmarks.training_step                       # the grid of docs/performance.md
    python -m benchmarks.training_step --cases 32x24x16 --dtype bfloat16 --repeats 30

Both sides train the same prompts and head of the same random Llama (hidden 512, 8 blocks unless said otherwise); their
steps are interleaved in one run and medians compared, since the machine may be noisy. The local side concatenates the
prefix to every sample. The server is a process of its own with as many threads as the local side.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import save_rows
from petals_lightning.hf.loading import quiet_transformers
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification

PREFIX = "benchmark"


def save_random_llama(folder: str, *, hidden: int, blocks: int, dtype: str, is_thin: bool = False) -> None:
    """`is_thin`: next to no arithmetic inside the blocks, for servers whose compute time is stated."""
    heads, intermediate, head_dim = hidden // 64, hidden * 8 // 3 // 16 * 16, 64
    if is_thin:
        heads, intermediate, head_dim = 1, 16, 16
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=2048,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def start_server(
    model: str,
    threads: int,
    *extra: str,
    join: tuple[str, ...] = ("--new-swarm",),
    program: tuple[str, ...] = ("petals_lightning.cli.main",),
) -> tuple[subprocess.Popen[str], str]:
    """A server, of all blocks unless `extra` says otherwise; returns its process and address."""
    process = subprocess.Popen(
        [sys.executable, "-m", *program, "serve", model, *join, "--dht-prefix", PREFIX,
         "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--threads", str(threads), *extra],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    maddr = ""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("multiaddress:"):
            maddr = line.split()[1]
        if line.startswith("ready"):
            return process, maddr
    raise RuntimeError("the server did not start")


def batch_of(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, 1000, (batch, tokens))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.randint(0, 2, (batch,)),
    }


def run_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    began = time.perf_counter()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    return time.perf_counter() - began


def training_rounds(
    models: Mapping[str, torch.nn.Module], batch: dict[str, torch.Tensor]
) -> dict[str, Callable[[], float]]:
    """For each model, what trains it by a step and returns the seconds."""

    def round_of(model: torch.nn.Module) -> Callable[[], float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return lambda: run_step(model, optimizer, batch)

    return {name: round_of(model) for name, model in models.items()}


def main(
    cases: Annotated[str, typer.Option(help="batch×tokens×P, comma separated")] = "16x64x16,32x24x16,8x256x16,16x16x16",
    hidden: int = 512,
    blocks: int = 8,
    dtype: str = "float32",
    tuning_mode: str = "deep_ptune",
    repeats: int = 15,
    threads: int = 2,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per case: seconds of both sides, their ratio, bytes on the streams."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype=dtype)
        server, maddr = start_server(folder, threads)
        try:
            for case in cases.split(","):
                batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
                options = {"tuning_mode": tuning_mode, "pre_seq_len": pre_seq_len, "num_labels": 2}
                remote = AutoDistributedModelForSequenceClassification.from_pretrained(
                    folder, initial_peers=[maddr], dht_prefix=PREFIX, **options
                )
                local = LocalModelForSequenceClassification.from_pretrained(folder, **options)
                models = {"swarm": remote, "local": local}
                optimizers = {
                    name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
                    for name, model in models.items()
                }
                seconds: dict[str, list[float]] = {"swarm": [], "local": []}
                stats, batch = remote_blocks(remote).stats, batch_of(batch_size, tokens)
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
        finally:
            server.terminate()
            server.wait()
    table = Table(title=f"training step, Llama {hidden} × {blocks}, {dtype}, {tuning_mode}, {threads} threads")
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
