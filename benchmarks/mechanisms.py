"""What each mechanism alone brings: a training step with everything on, and with one thing switched off.

    python -m benchmarks.mechanisms
    python -m benchmarks.mechanisms --cases 16x64x16 --data ../shared/data/sst2 --repeats 9

Every pair of rows is a run of its own with two servers of the same random Llama (hidden 512, 8 blocks, float32), one as
it is and one with the mechanism off; their steps alternate and medians are compared, then bytes on the streams. Prompts
that have not changed are not sent again: that shows in validation, since each training step changes them. "All of
these" is on our stream; by Petals' methods on our server, prompts also go along with every request and their gradients
come back for each sample.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import full_last_block
from benchmarks.options import Cases, Output, parse_case
from benchmarks.rounds import Row, alternate, report
from benchmarks.servers import Program, running_server
from benchmarks.sst2_epoch import DATA, SAVINGS_OFF, Batch, grouped_batches, padded_batches, read_samples
from benchmarks.swarm import Wasteful, batch_of, classifier, optimizer_of, run_step, save_random_llama
from petals_lightning.cli.main import main as serve
from petals_lightning.client import ClientConfig
from petals_lightning.models import prompts_of, remote_blocks

VOCABULARY = 8000
SENTENCES = "train.jsonl", "train_phrases.jsonl"


def as_it_is(model: Any) -> Any:
    return model


@dataclass(frozen=True)
class Variant:
    """One side: options of its server, its program, options of its client, and what is done to its model."""

    server: tuple[str, ...] = ()
    program: Program = serve
    client: ClientConfig | None = None
    wrap: Callable[[Any], Any] = as_it_is


OFF = {
    "kept graphs": Variant(server=("--graph-memory", "0")),
    "prefix once": Variant(server=("--no-share-prefix",)),
    "rows only": Variant(wrap=partial(Wasteful, input_grad=False)),
    "last block for read positions": Variant(program=full_last_block.serve),
    "no input gradient": Variant(wrap=partial(Wasteful, all_positions=False)),
    "all of these": Variant(server=SAVINGS_OFF, wrap=Wasteful),
    "all, by Petals' methods": Variant(server=("--petals-only",), wrap=Wasteful),
}
WIDE = Variant(client=ClientConfig(wire_dtype="float32"))


class Side:
    """A server with a client; a round of it gives seconds, and is counted."""

    def __init__(self, stack: ExitStack, folder: str, variant: Variant, pre_seq_len: int, threads: int):
        server = stack.enter_context(running_server(folder, threads, *variant.server, program=variant.program))
        torch.manual_seed(0)
        self._model = classifier(folder, server.maddr, pre_seq_len, client_config=variant.client)
        stack.callback(remote_blocks(self._model).close)
        self._wrapped, self._optimizer = variant.wrap(self._model), optimizer_of(self._model)
        self._rounds, self._stats = 0, remote_blocks(self._model).stats

    def train(self, batches: Iterator[Batch]) -> float:
        self._rounds += 1
        return run_step(self._wrapped, self._optimizer, next(batches))

    def validate(self, batch: Batch, *, anew: bool) -> float:
        """A forward; with `anew` behind prompts that have changed, and so must be sent."""
        self._rounds += 1
        with torch.no_grad():
            if anew:
                prompts_of(self._model).deep.add_(1e-6)
            began = time.perf_counter()
            self._wrapped(**batch)
            return time.perf_counter() - began

    @property
    def megabytes(self) -> float:
        """Sent and received in a round."""
        return (self._stats.bytes_sent + self._stats.bytes_received) / self._rounds / 1e6


@dataclass
class Comparison:
    """Makes the rows whose names contain `only`; `hidden` and `blocks` are the model's."""

    only: str
    hidden: int
    blocks: int
    pre_seq_len: int
    threads: int
    repeats: int
    rows: list[Row] = field(default_factory=list)

    def run(
        self, name: str, off: Variant, rounds: Callable[[Side, bool], Callable[[], float]], dtype: str = "float32"
    ) -> None:
        """Adds two rows, of time and of bytes; `rounds` gives what a side runs, told whether it is the one with it."""
        if self.only not in name:
            return
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            save_random_llama(folder, hidden=self.hidden, blocks=self.blocks, dtype=dtype, vocabulary=VOCABULARY)
            sides = {
                "off": Side(stack, folder, off, self.pre_seq_len, self.threads),
                "on": Side(stack, folder, Variant(), self.pre_seq_len, self.threads),
            }
            seconds = alternate({side: rounds(sides[side], side == "on") for side in sides}, self.repeats)
            self.rows.append((f"{name}, ms", seconds["off"] * 1e3, seconds["on"] * 1e3))
            self.rows.append((f"{name}, MB", sides["off"].megabytes, sides["on"].megabytes))


def main(
    cases: Cases = "16x64x16,32x24x16",
    data: Annotated[Path, typer.Option(help="Folder of SST-2 in JSON lines; without it that row is left out.")] = DATA,
    only: Annotated[str, typer.Option(help="Only mechanisms whose names contain this.")] = "",
    hidden: int = 512,
    blocks: int = 8,
    repeats: int = 7,
    threads: int = 2,
    output: Output = None,
) -> None:
    """Prints two rows per mechanism: time and bytes of a step, off and on."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for case in cases.split(","):
        batch_size, tokens, pre_seq_len = parse_case(case)
        batch = batch_of(batch_size, tokens)
        comparison = Comparison(only, hidden, blocks, pre_seq_len, threads, repeats)

        def training(side: Side, on: bool, batch: Batch = batch) -> Callable[[], float]:
            return lambda: side.train(repeat(batch))

        def validation(side: Side, on: bool, batch: Batch = batch) -> Callable[[], float]:
            return lambda: side.validate(batch, anew=not on)

        for name, variant in OFF.items():
            comparison.run(f"{case}, {name}", variant, training)
        comparison.run(f"{case}, 16-bit wire, model in bf16", WIDE, training, dtype="bfloat16")
        comparison.run(f"{case}, prompts once, validation step", Variant(), validation)
        rows += comparison.rows
    for name in SENTENCES if data.is_dir() else ():
        samples = read_samples(data / name, VOCABULARY)
        batches = {True: grouped_batches(samples, 32), False: padded_batches(samples, 32)}
        comparison = Comparison(only, hidden, blocks, 16, threads, repeats)

        def epoch(side: Side, on: bool, batches: dict[bool, list[Batch]] = batches) -> Callable[[], float]:
            rest = iter(batches[on])
            return lambda: sum(side.train(rest) for _ in range(8)) / 8

        comparison.run(f"{name}, batches of 32 of similar length against padding to 64", Variant(), epoch)
        rows += comparison.rows
    report(f"Llama {hidden} × {blocks}, {threads} threads", ("off", "on", "off / on"), rows, output)


if __name__ == "__main__":
    typer.run(main)
