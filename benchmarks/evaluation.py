"""Validation over a slow link, with several batches on their way at once and with one at a time.

    python -m benchmarks.evaluation                       # 100 Mbit/s and 50 ms round trip
    python -m benchmarks.evaluation --round-trip 0.2 --in-flight 8

The bundled model and reviews, one server behind a TCP proxy that delays and throttles what passes. Rounds of both sides
alternate in one run, medians are compared, and the metrics of all rounds must be equal.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from typing import Annotated

import pytorch_lightning as pl
import torch
import typer

from benchmarks.options import Mbits, Output, RoundTrip
from benchmarks.rounds import alternate, report
from benchmarks.servers import even_spans
from benchmarks.slow_link import slow_chain
from benchmarks.swarm import PREFIX
from petals_lightning.data import TextClassificationDataModule
from petals_lightning.hf import Checkpoint
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
    batches: Annotated[int, typer.Option(help="of the validation split; 0 for all")] = 0,
    mbits: Mbits = 100.0,
    round_trip: RoundTrip = 0.05,
    repeats: int = 5,
    output: Output = None,
) -> None:
    """Prints milliseconds of both, and their ratio."""
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = str(MODEL_DIR)
        spans = even_spans(Checkpoint(model).config.num_hidden_layers, 1)
        chain = slow_chain(model, spans, threads=1, delay=round_trip / 2, rate=mbits * 1e6 / 8)
        maddr = stack.enter_context(chain)
        data = TextClassificationDataModule(model, batch_size=batch_size)

        def validate(size: int) -> float:
            torch.manual_seed(0)
            module = SequenceClassificationModule(model, pre_seq_len=8, dht_prefix=PREFIX)
            watch = Stopwatch()
            trainer = pl.Trainer(
                strategy=RemoteBlockStrategy(PrivateSwarm([maddr], batches_in_flight=size)), accelerator="cpu",
                limit_val_batches=batches or None, default_root_dir=folder, callbacks=[watch], logger=False,
                enable_model_summary=False, enable_progress_bar=False,
            )  # fmt: skip
            found.append(trainer.validate(module, datamodule=data, verbose=False))
            return watch.seconds

        seconds = alternate({"ours": lambda: validate(in_flight), "other": lambda: validate(1)}, repeats)
    if any(metrics != found[0] for metrics in found):
        raise SystemExit(f"the metrics differ: {found}")
    count = min(batches * batch_size or data.sizes["validation"], data.sizes["validation"])
    report(
        f"validation of {count} reviews in batches of {batch_size}, {mbits:g} Mbit/s, "
        f"{round_trip * 1e3:g} ms round trip",
        ("first ms", "second ms", "second / first"),
        [(f"{in_flight} batches in flight, one at a time", seconds["ours"] * 1e3, seconds["other"] * 1e3)],
        output,
        second_by_first=True,
    )


if __name__ == "__main__":
    typer.run(main)
