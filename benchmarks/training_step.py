"""Time and bytes of a training step: through one server on loopback, and in one local process with plain Hugging Face.

    python -m benchmarks.training_step                       # the grid of docs/performance.md
    python -m benchmarks.training_step --cases 32x24x16 --dtype bfloat16 --repeats 30
    python -m benchmarks.training_step --device cuda --dtype bfloat16 --hidden 4096 --blocks 16

Both sides train the same prompts and head of the same random Llama (hidden 512, 8 blocks unless said otherwise); their
steps are interleaved in one run and medians compared, since the machine may be noisy. The local side concatenates the
prefix to every sample. The server is a process of its own with as many threads as the local side.
"""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import torch
import typer

from benchmarks.options import Cases, Device, Output, parse_case
from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.servers import running_server
from benchmarks.swarm import batch_of, classifier, save_random_llama, training_rounds
from petals_lightning.models import remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification


class Row(NamedTuple):
    case: str
    swarm_seconds: float
    local_seconds: float
    ratio: float
    bytes_sent: int
    bytes_received: int


def main(
    cases: Cases = "16x64x16,32x24x16,8x256x16,16x16x16",
    hidden: int = 512,
    blocks: int = 8,
    dtype: str = "float32",
    tuning_mode: str = "deep_ptune",
    repeats: int = 15,
    threads: int = 2,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Prints a row per case: seconds of both sides, their ratio, bytes on the streams."""
    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype=dtype)
        with running_server(folder, threads, "--device", device) as server:
            for case in cases.split(","):
                batch_size, tokens, pre_seq_len = parse_case(case)
                options: dict[str, Any] = {"tuning_mode": tuning_mode, "pre_seq_len": pre_seq_len, "num_labels": 2}
                remote = classifier(folder, server.maddr, **options)
                local: Any = LocalModelForSequenceClassification.from_pretrained(folder, **options)
                models = {"swarm": remote.to(device), "local": local.to(device)}
                step = training_rounds(models, batch_of(batch_size, tokens, device))
                seconds = alternate(step, repeats)
                stats = remote_blocks(remote).stats
                before = stats.bytes_sent, stats.bytes_received
                step["swarm"]()
                moved = stats.bytes_sent - before[0], stats.bytes_received - before[1]
                remote_blocks(remote).close()
                rows.append(Row(case, seconds["swarm"], seconds["local"], seconds["swarm"] / seconds["local"], *moved))
    print_table(
        f"training step, Llama {hidden} × {blocks}, {dtype}, {tuning_mode}, {device}, {threads} threads",
        ("batch×tokens×P", "swarm ms", "local ms", "swarm / local", "MB sent", "MB received", "MB"),
        [
            (
                row.case, f"{row.swarm_seconds * 1e3:.0f}", f"{row.local_seconds * 1e3:.0f}", f"{row.ratio:.2f}",
                f"{row.bytes_sent / 1e6:.2f}", f"{row.bytes_received / 1e6:.2f}",
                f"{(row.bytes_sent + row.bytes_received) / 1e6:.2f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    save_rows([row._asdict() for row in rows], output)


if __name__ == "__main__":
    typer.run(main)
