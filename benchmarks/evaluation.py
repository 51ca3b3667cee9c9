"""Validation over a slow link, with several batches on their way at once and with one at a time.

    python -m benchmarks.evaluation                       # 100 Mbit/s and 50 ms round trip
    python -m benchmarks.evaluation --round-trip 0.2 --in-flight 8

The bundled model and reviews, one server behind a TCP proxy that delays and throttles what passes. Rounds of both sides
alternate in one run, medians are compared, and the metrics of all rounds must be equal.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch
import typer

from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.slow_link import Link
from benchmarks.training_step import PREFIX
from petals_lightning.data import TextClassificationDataModule
from petals_lightning.modules import SequenceClassificationModule
from petals_lightning.sample import MODEL_DIR
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy


class Stopwatch(pl.Callback):
    """Seconds of a validation without the way into the swarm."""

    seconds = 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = -time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.perf_counter()


def main(
    in_flight: int = 4,
    batch_size: int = 32,
    mbits: Annotated[float, typer.Option(help="of each connection and direction, in Mbit/s")] = 100.0,
    round_trip: Annotated[float, typer.Option(help="seconds from the client to the server and back")] = 0.05,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints seconds of both, and their ratio."""
    torch.set_num_threads(1)
    link, found = Link(round_trip / 2, mbits * 1e6 / 8), []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        maddr = link.start_server(stack, str(MODEL_DIR), 1)

        def validate(size: int) -> float:
            torch.manual_seed(0)
            module = SequenceClassificationModule(str(MODEL_DIR), pre_seq_len=8, dht_prefix=PREFIX)
            watch, options = Stopwatch(), {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
            trainer = pl.Trainer(
                strategy=RemoteBlockStrategy(PrivateSwarm([maddr], batches_in_flight=size)),
                default_root_dir=folder, enable_model_summary=False, callbacks=[watch], **options,
            )  # fmt: skip
            found.append(trainer.validate(module, datamodule=data, verbose=False))
            return watch.seconds

        data: Any = TextClassificationDataModule(str(MODEL_DIR), batch_size=batch_size)
        rounds: dict[str, Callable[[], float]] = {"ours": lambda: validate(in_flight), "other": lambda: validate(1)}
        seconds = alternate(rounds, repeats)
    assert all(metrics == found[0] for metrics in found), "the metrics differ"
    rows = [(f"{in_flight} batches in flight, one at a time", seconds["ours"], seconds["other"])]
    print_table(
        f"validation of {data.sizes['validation']} reviews in batches of {batch_size}, "
        f"{mbits:g} Mbit/s, {round_trip * 1e3:g} ms round trip",
        ("first ms", "second ms", "second / first"),
        [(case, ours * 1e3, other * 1e3) for case, ours, other in rows],
        second_by_first=True,
    )
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
