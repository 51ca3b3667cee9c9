"""Time of an epoch of SST-2 through one server: with everything that saves work, and with it switched off.

    python -m benchmarks.sst2_epoch                                   # both files of ../shared/data/sst2, in part
    python -m benchmarks.sst2_epoch --limit 0 --files train.jsonl     # a whole epoch
    python -m benchmarks.sst2_epoch --data my/folder --limit 512

Ours is what a training run does: batches of similar length, padded on the right to their longest sample, the prefix run
once, graphs kept between forward and backward, only the rows read that the loss needs. The other side is a server of
ours whose savings are switched off (`--graph-memory 0`, so that backward sends the inputs again and recomputes the
forward; `--no-share-prefix`, so that the prefix is run with every sample), with batches in the order of the file padded
to 64 tokens, all outputs sent back and a gradient of all inputs.

Both sides train the same random Llama (hidden 512, 8 blocks, float32) on the same samples; tokens are those of a
byte-level BPE trained on the file. The epoch is cut into pieces which the sides run in turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import datasets
import tokenizers
import torch
import typer
from transformers import PreTrainedTokenizerFast

from benchmarks.options import Output
from benchmarks.rounds import print_table, save_rows
from benchmarks.servers import running_server
from benchmarks.swarm import Wasteful, classifier, optimizer_of, run_step, save_random_llama
from petals_lightning.data.collate import EncodedTexts, PadRight
from petals_lightning.data.loader import LengthGroupedSampler
from petals_lightning.models import remote_blocks

PAD, PADDED_LENGTH = 0, 64
SAVINGS_OFF = ("--graph-memory", "0", "--no-share-prefix")
DATA = Path("../shared/data/sst2")

Batch = dict[str, torch.Tensor]


def read_samples(path: Path, vocabulary: int) -> EncodedTexts:
    """The sentences of a file of JSON lines with `sentence` and `label`, in tokens of a BPE trained on them."""
    if not path.is_file():
        raise typer.BadParameter(
            f"{path} is not there: give the folder of SST-2 with --data, as JSON lines with `sentence` and `label`"
        )
    rows = datasets.Dataset.from_json(str(path), cache_dir=tempfile.gettempdir())
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(rows["sentence"], vocab_size=vocabulary, special_tokens=["<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>")
    return EncodedTexts(tokenizer, rows["sentence"][:], None, rows["label"][:], PADDED_LENGTH)


def grouped_batches(samples: EncodedTexts, batch_size: int) -> list[Batch]:
    """An epoch in batches of similar length, as the DataModules make them."""
    order = list(LengthGroupedSampler(samples.lengths, batch_size, seed=0))
    return [_collate(samples, order[at : at + batch_size]) for at in range(0, len(order), batch_size)]


def padded_batches(samples: EncodedTexts, batch_size: int) -> list[Batch]:
    """The same samples in the order of the file, all padded to 64 tokens."""
    batches = []
    for at in range(0, len(samples), batch_size):
        batch = _collate(samples, range(at, min(at + batch_size, len(samples))))
        short = PADDED_LENGTH - batch["input_ids"].shape[1]
        padded = {k: torch.nn.functional.pad(batch[k], (0, short)) for k in ("input_ids", "attention_mask")}
        batches.append({**batch, **padded})
    return batches


def _collate(samples: EncodedTexts, indices: Sequence[int]) -> Batch:
    return PadRight(PAD)([samples[index] for index in indices])


def run_epoch(
    models: dict[str, Any], trainable: dict[str, torch.nn.Module], epochs: dict[str, list[Batch]], piece: int
) -> dict[str, float]:
    """Seconds of each side for all of its batches; the sides take turns after each `piece` of them."""
    optimizers = {side: optimizer_of(model) for side, model in trainable.items()}
    seconds = dict.fromkeys(models, 0.0)
    for side, model in models.items():
        for batch in epochs[side][:2]:
            run_step(model, optimizers[side], batch)
    for start in range(0, max(len(batches) for batches in epochs.values()), piece):
        for side, model in models.items():
            for batch in epochs[side][start : start + piece]:
                seconds[side] += run_step(model, optimizers[side], batch)
    return seconds


def compare(
    path: Path, *, limit: int, batch_size: int, pre_seq_len: int, hidden: int, blocks: int, threads: int
) -> dict[str, Any]:
    """Both sides on one file; returns seconds, bytes and tokens."""
    samples = read_samples(path, vocabulary=8000)
    if limit:
        chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:limit].tolist()
        samples.input_ids = [samples.input_ids[index] for index in chosen]
        samples.labels = [samples.labels[index] for index in chosen] if samples.labels else None
    epochs = {"ours": grouped_batches(samples, batch_size), "off": padded_batches(samples, batch_size)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32", vocabulary=8000)
        loaded = {}
        for side, options in {"ours": (), "off": SAVINGS_OFF}.items():
            server = stack.enter_context(running_server(folder, threads, *options))
            torch.manual_seed(0)
            loaded[side] = classifier(folder, server.maddr, pre_seq_len)
            stack.callback(remote_blocks(loaded[side]).close)
        models = {"ours": loaded["ours"], "off": Wasteful(loaded["off"])}
        with torch.no_grad():
            losses = [model(**epochs["off"][0]).loss.item() for model in models.values()]
        if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
            raise SystemExit(f"the two sides do not compute the same: losses {losses}")
        seconds = run_epoch(models, loaded, epochs, piece=4)
        moved = {side: remote_blocks(model).stats for side, model in loaded.items()}
    return {
        "file": path.name, "samples": len(samples), "mean_tokens": statistics.mean(samples.lengths),
        "ours_seconds": seconds["ours"], "off_seconds": seconds["off"], "ratio": seconds["off"] / seconds["ours"],
        "ours_bytes": moved["ours"].bytes_sent + moved["ours"].bytes_received,
        "off_bytes": moved["off"].bytes_sent + moved["off"].bytes_received,
    }  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="Folder of SST-2 in JSON lines.")] = DATA,
    files: Annotated[str, typer.Option(help="of the folder, comma separated")] = "train.jsonl,train_phrases.jsonl",
    limit: Annotated[int, typer.Option(help="Samples of each file, drawn at random; 0 takes all.")] = 1024,
    batch_size: int = 32,
    pre_seq_len: int = 16,
    hidden: int = 512,
    blocks: int = 8,
    threads: int = 2,
    output: Output = None,
) -> None:
    """Prints a row per file."""
    torch.set_num_threads(threads)
    rows = [
        compare(
            data / name, limit=limit, batch_size=batch_size, pre_seq_len=pre_seq_len, hidden=hidden, blocks=blocks,
            threads=threads,
        )
        for name in files.split(",")
    ]  # fmt: skip
    print_table(
        f"SST-2, Llama {hidden} × {blocks}, float32, batches of {batch_size}, P = {pre_seq_len}, {threads} threads",
        ("case", "ours s", "savings off s", "off / ours"),
        [
            (
                f"{row['file']}: {row['samples']} samples of {row['mean_tokens']:.1f} tokens",
                f"{row['ours_seconds']:.1f}", f"{row['off_seconds']:.1f}", f"{row['ratio']:.2f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
