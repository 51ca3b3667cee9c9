"""Validation over a slow link, in batches of several sizes.

    python -m benchmarks.evaluation                       # 100 Mbit/s and 50 ms round trip
    python -m benchmarks.evaluation --round-trip 0.2 --eval-batch-size 256

The bundled model and reviews, one server behind a TCP proxy that delays and throttles what passes. Rounds of both sides
alternate in one run, medians are compared, and the metrics of all rounds must agree.
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
    eval_batch_size: Annotated[int, typer.Option(help="compared with batch_size")] = 128,
    batch_size: int = 32,
    limit: Annotated[int, typer.Option(help="texts of the validation split; 0 for all")] = 0,
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

        def validate(size: int) -> float:
            torch.manual_seed(0)
            data = TextClassificationDataModule(model, eval_batch_size=size)
            module = SequenceClassificationModule(model, pre_seq_len=8, dht_prefix=PREFIX)
            watch = Stopwatch()
            trainer = pl.Trainer(
                strategy=RemoteBlockStrategy(PrivateSwarm([maddr])), accelerator="cpu",
                limit_val_batches=limit // size or None, default_root_dir=folder, callbacks=[watch], logger=False,
                enable_model_summary=False, enable_progress_bar=False,
            )  # fmt: skip
            found.append(trainer.validate(module, datamodule=data, verbose=False))
            return watch.seconds

        seconds = alternate({"ours": lambda: validate(eval_batch_size), "other": lambda: validate(batch_size)}, repeats)
    if any(abs(metrics[0][name] - value) > 1e-4 for metrics in found for name, value in found[0][0].items()):
        raise SystemExit(f"the metrics differ: {found}")
    report(
        f"validation of {limit or 'all'} bundled reviews, {mbits:g} Mbit/s, {round_trip * 1e3:g} ms round trip",
        ("first ms", "second ms", "second / first"),
        [(f"batches of {eval_batch_size}, of {batch_size}", seconds["ours"] * 1e3, seconds["other"] * 1e3)],
        output,
        second_by_first=True,
    )


if __name__ == "__main__":
    typer.run(main)
