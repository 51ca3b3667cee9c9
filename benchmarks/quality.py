"""What each way of tuning reaches on real texts: method × start × data × seed, all in this process.

    python -m benchmarks.quality FOLDER --model HuggingFaceTB/SmolLM2-135M-Instruct
    python -m benchmarks.quality FOLDER --sets sst2 --methods head,ptune,lora --starts random,text --shots 16,64,256
    python -m benchmarks.quality FOLDER --show     # the tables of what was run so far

FOLDER holds the data: `sst2` and `cr` (train.jsonl and validation.jsonl with `sentence` and `label`, 0 negative and 1
positive) and `dialogue/self_dialogue` (the same files with `turns`). A set that is missing is left out with a notice.

A run trains for a fixed number of steps and is scored once, at its end, on the validation part: accuracy, macro-F1 and
Matthews correlation of classes; perplexity of the assistant's tokens of dialogues. Nothing is chosen by looking at it.
Each finished run is appended to the results file and not run again, so that a benchmark of hours can be interrupted.

Methods: `head` (the classification head alone), `ptune`, `deep_ptune` and `prefix` (with a head, or on dialogues
without), `verbalized_ptune`, `verbalized_deep_ptune` and `verbalized_prefix` (words of the language model instead of a
head), and `lora`: PEFT's LoRA on its usual targets (queries and values), rank 8, of a local copy, with a head; with
`--servers N`, ours through a swarm. The start `zero` is for a prefix, and skipped for other methods.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import pytorch_lightning as pl
import torch
import typer
from transformers import PreTrainedModel

from benchmarks.options import parse_numbers
from benchmarks.quality_report import SCORES, draw_rows, print_rows
from petals_lightning.data import DialogueDataModule, TextClassificationDataModule, TextDataModule
from petals_lightning.modules import (
    CausalLMModule,
    SequenceClassificationModule,
    TuningModule,
    VerbalizedClassificationModule,
)
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.strategies import LocalSwarm, RemoteBlockStrategy

MODES = ("ptune", "deep_ptune", "prefix")
PROMPTS = (*MODES, *(f"verbalized_{mode}" for mode in MODES))
METHODS = ("head", *PROMPTS, "lora")
STARTS = ("random", "vocabulary", "text", "zero")
WORDS = {0: " bad", 1: " great"}
TEMPLATE = "{text} It was"
VALIDATION = {"sst2": "sst2", "cr": "cr", "dialogue": "dialogue/self_dialogue"}
"""Each set's folder."""
TEXTS = {
    "sst2": "Is this review positive or negative? Review:",
    "cr": "Is this review positive or negative? Review:",
    "dialogue": "A friendly conversation of two people about films, music and sports:",
}
"""Each set's text to start prompts from."""


@dataclass(frozen=True)
class Case:
    """One run. Its fields are its key in the results file."""

    model: str
    set: str
    method: str
    start: str | None
    """None for methods without prompts."""
    shots: int
    """Training texts of each class (dialogues: of all); 0 takes the whole training part."""
    seed: int
    steps: int
    batch_size: int
    pre_seq_len: int | None
    lr: float
    head_lr: float | None
    deep_lr: float | None
    clip: float | None
    limit: int
    """Validation texts; 0 takes all."""
    dtype: str
    """Of the frozen weights. Prompts, LoRA's factors and heads are float32."""
    servers: int
    """On loopback; 0: all blocks in this process."""
    quant_type: str
    """Of the servers' weights."""

    @property
    def is_text(self) -> bool:
        return self.set != "dialogue"


class _WithLora:
    """A module whose model gets PEFT's LoRA layers when it is loaded."""

    has_head = True  # something to train without prompts

    def _load(self, strategy: Any) -> PreTrainedModel:
        model: PreTrainedModel = super()._load(strategy)  # type: ignore[misc]
        head = [weight for weight in model.parameters() if weight.requires_grad]
        config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0)
        peft.inject_adapter_in_model(config, model)
        for weight in head:
            weight.requires_grad_(True)  # which PEFT has frozen
        return model


class LoraClassification(_WithLora, SequenceClassificationModule):
    pass


class LoraCausalLM(_WithLora, CausalLMModule):
    pass


def make_module(case: Case) -> TuningModule:
    """The case's module. Its random values are drawn when a Trainer loads the model."""
    options: dict[str, Any] = {
        "lr": case.lr, "head_lr": case.head_lr, "deep_lr": case.deep_lr, "dtype": case.dtype, "tuning_mode": None,
    }  # fmt: skip
    if case.method in PROMPTS:
        options |= {"tuning_mode": case.method.removeprefix("verbalized_"), "pre_seq_len": case.pre_seq_len}
        options |= {"prompt_init": case.start, "prompt_init_text": TEXTS[case.set] if case.start == "text" else None}
    if case.method.startswith("verbalized"):
        return VerbalizedClassificationModule(case.model, verbalizer=WORDS, **options)
    by_peft = case.method == "lora" and not case.servers
    if case.method == "lora" and not by_peft:
        options |= {"tuning_mode": "lora", "r": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]}
    if case.is_text:
        return (LoraClassification if by_peft else SequenceClassificationModule)(case.model, **options)
    return (LoraCausalLM if by_peft else CausalLMModule)(case.model, **options)


def make_data(case: Case, folder: Path) -> TextDataModule:
    """The case's data, from a folder that `write_parts` has filled."""
    options: dict[str, Any] = {"batch_size": case.batch_size, "seed": case.seed, "max_length": 128}
    if not case.is_text:
        return DialogueDataModule(case.model, str(folder), **options)
    template = TEMPLATE if case.method.startswith("verbalized") else None
    return TextClassificationDataModule(case.model, str(folder), template=template, **options)


def write_parts(case: Case, source: Path, folder: Path) -> None:
    """Writes the training and validation rows of a case. The seed draws few-shot rows, but none of validation's."""
    rows = {
        part: (source / f"{part}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
        for part in ("train", "validation")
    }
    if case.shots:
        random.Random(case.seed).shuffle(rows["train"])
        by_class: dict[Any, list[str]] = {}
        for row in rows["train"]:
            by_class.setdefault(json.loads(row).get("label"), []).append(row)
        rows["train"] = [row for each in by_class.values() for row in each[: case.shots]]
    if case.limit:
        random.Random(0).shuffle(rows["validation"])
        del rows["validation"][case.limit :]
    for part, lines in rows.items():
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_case(case: Case, source: Path, accelerator: str) -> dict[str, Any]:
    """Trains and scores one case; returns its row."""
    pl.seed_everything(case.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        write_parts(case, source, Path(folder))
        data, module = make_data(case, Path(folder)), make_module(case)
        swarm = LocalSwarm(case.servers, quant_type=case.quant_type) if case.servers else None
        trainer = pl.Trainer(
            strategy=RemoteBlockStrategy(swarm) if swarm else "auto",
            max_steps=case.steps, max_epochs=-1, gradient_clip_val=case.clip, accelerator=accelerator, devices=1,
            limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        with swarm.keep_alive(module.served_model, Path(folder) / "servers") if swarm else nullcontext():
            started = time.monotonic()
            trainer.fit(module, datamodule=data)
            seconds = time.monotonic() - started
            trainer.limit_val_batches = 1.0
            (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    return {
        **asdict(case),
        **{name: round(scores[f"val/{name}"], 6) for name in SCORES if f"val/{name}" in scores},
        "loss": round(scores["val/loss"], 6),
        "parameters": sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
        "seconds": round(seconds, 1),
    }


def cases_of(
    sets: Sequence[str], methods: Sequence[str], starts: Sequence[str], shots: Sequence[int], seeds: Sequence[int],
    rates: dict[str, float], **same: Any,
) -> Iterator[Case]:  # fmt: skip
    """All cases, each seed of all of them before the next, so that an interrupted benchmark has compared something.

    Args:
        rates: the learning rate of each method that has one of its own.
        same: fields that all cases share.
    """
    for seed, name, few, method in itertools.product(seeds, sets, shots, methods):
        if name == "dialogue" and (method == "head" or method.startswith("verbalized")):
            continue  # nothing to classify
        fitting = [start for start in starts if start != "zero" or method.endswith("prefix")]
        for start in fitting if method in PROMPTS else [None]:
            own = {**same, "lr": rates.get(method, same["lr"])}
            if method not in PROMPTS:
                own["pre_seq_len"] = None
            if method == "head":
                own["lr"] = same["head_lr"] or own["lr"]  # which of the two was given changes no run
            yield Case(set=name, method=method, start=start, shots=few, seed=seed, **own)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def _chosen(names: str, known: Sequence[str], option: str) -> list[str]:
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"{option} {','.join(unknown)}: there are {', '.join(known)}")
    return chosen


def main(
    data: Annotated[Path, typer.Argument(help="Folder with sst2, cr and dialogue/self_dialogue.")],
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    output: Annotated[Path, typer.Option(help="The results; runs that are in it are not run again.")] = Path(
        "benchmarks/quality.json"
    ),
    sets: Annotated[str, typer.Option(help="comma separated")] = ",".join(VALIDATION),
    methods: Annotated[str, typer.Option(help="comma separated")] = ",".join(METHODS),
    starts: Annotated[str, typer.Option(help="of prompts, comma separated")] = ",".join(STARTS),
    shots: Annotated[str, typer.Option(help="Training texts of each class, comma separated; 0: all.")] = "0",
    seeds: Annotated[str, typer.Option(help="comma separated")] = "0,1,2",
    steps: int = 216,
    batch_size: int = 32,
    pre_seq_len: int = 16,
    lr: Annotated[float, typer.Option(help="of prompts, and of a head alone")] = 1e-2,
    lora_lr: Annotated[float, typer.Option(help="of LoRA and its head")] = 1e-3,
    prefix_lr: Annotated[float | None, typer.Option(help="of a prefix; none: as the rest")] = None,
    head_lr: Annotated[float | None, typer.Option(help="of heads; none: as the rest")] = None,
    deep_lr: Annotated[float | None, typer.Option(help="of the prompts of every block; none: as the rest")] = None,
    clip: Annotated[float | None, typer.Option(help="norm to which gradients are clipped")] = None,
    limit: Annotated[int, typer.Option(help="Validation texts; 0: all.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights.")] = "float32",
    servers: Annotated[int, typer.Option(help="Servers on loopback; 0: all blocks in this process.")] = 0,
    quant_type: Annotated[str, typer.Option(help="Of the servers' weights: none, int8 or nf4.")] = UNQUANTIZED,
    threads: int = 2,
    accelerator: str = "auto",
    show: Annotated[bool, typer.Option(help="Print the results of earlier runs and run nothing.")] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw the runs of SST-2 into.")] = None,
) -> None:
    """Runs what the results file lacks, prints tables of it, and draws it if asked to."""
    torch.set_num_threads(threads)
    chosen = _chosen(sets, list(VALIDATION), "--sets")
    for name in list(chosen):
        if not (data / VALIDATION[name] / "train.jsonl").is_file():
            print(f"{name} is left out: {data / VALIDATION[name]} has no train.jsonl")
            chosen.remove(name)
    rates = {"lora": lora_lr} | ({"prefix": prefix_lr, "verbalized_prefix": prefix_lr} if prefix_lr else {})
    cases = cases_of(
        chosen, _chosen(methods, METHODS, "--methods"), _chosen(starts, STARTS, "--starts"), parse_numbers(shots),
        parse_numbers(seeds), rates, model=model, steps=steps, batch_size=batch_size,
        pre_seq_len=pre_seq_len, lr=lr, head_lr=head_lr, deep_lr=deep_lr, clip=clip, limit=limit, dtype=dtype,
        servers=servers, quant_type=quant_type,
    )  # fmt: skip
    rows = read_rows(output)
    for case in [] if show else cases:
        if any(asdict(case).items() <= row.items() for row in rows):
            continue
        row = run_case(case, data / VALIDATION[case.set], accelerator)
        rows = [*read_rows(output), row]  # read after the run: another process may have written meanwhile
        unfinished = output.with_suffix(".tmp")
        unfinished.write_text(json.dumps(rows, indent=1) + "\n")
        unfinished.replace(output)
        print(json.dumps(rows[-1]), flush=True)
    print_rows(rows)
    if picture is not None:
        draw_rows(rows, picture)


if __name__ == "__main__":
    typer.run(main)
