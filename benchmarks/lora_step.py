"""A training step with LoRA: beside one with deep prompts, and beside PEFT's in one local process.

    python -m benchmarks.lora_step                                   # q and v, r=8; hidden 512 × 8 blocks; 16 × 64
    python -m benchmarks.lora_step --target-modules all-linear --rank 16 --cases 8x256x16

All train a head too, on the same random Llama. The first two go through one server on loopback, a process of its own
with as many threads as the local side. Steps are interleaved in one run and medians compared. P of a case is that of
the deep prompts. Bytes are those of a LoRA step on the stream, next to those of what must travel: hidden states of all
positions, outputs and their gradients at the positions that are read, factors and their gradients.
"""

from __future__ import annotations

import tempfile
from typing import Annotated, Any, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from benchmarks.options import Cases, Device, Output, parse_case
from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.servers import running_server
from benchmarks.swarm import batch_of, classifier, save_random_llama, training_rounds
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import lora_of, remote_blocks


class Row(NamedTuple):
    case: str
    lora_seconds: float
    deep_ptune_seconds: float
    peft_seconds: float
    by_deep_ptune: float
    by_peft: float
    bytes_moved: int
    bytes_needed: int


def main(
    cases: Cases = "16x64x16",
    rank: int = 8,
    target_modules: Annotated[str, typer.Option(help="Linear modules, comma separated, or all-linear.")] = (
        "q_proj,v_proj"
    ),
    hidden: int = 512,
    blocks: int = 8,
    repeats: int = 15,
    threads: int = 2,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Prints a row per case: seconds of the three sides, ratios of LoRA's to the others', bytes."""
    torch.set_num_threads(threads)
    targets = target_modules if target_modules == "all-linear" else target_modules.split(",")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="SEQ_CLS")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32")
        with running_server(folder, threads, "--device", device) as server:
            for case in cases.split(","):
                batch_size, tokens, pre_seq_len = parse_case(case)
                lora = classifier(folder, server.maddr, pre_seq_len, tuning_mode="lora", lora=config)
                deep = classifier(folder, server.maddr, pre_seq_len)
                models = {"lora": lora, "deep_ptune": deep, "peft": by_peft(folder, config)}
                steps = training_rounds(
                    {name: model.to(device) for name, model in models.items()}, batch_of(batch_size, tokens, device)
                )
                seconds, stats = alternate(steps, repeats), remote_blocks(lora).stats
                before = stats.bytes_sent + stats.bytes_received
                steps["lora"]()
                moved = stats.bytes_sent + stats.bytes_received - before
                factors = sum(parameter.numel() for parameter in lora_of(lora).parameters())
                needed = 4 * (batch_size * tokens * hidden + 2 * batch_size * hidden + 2 * factors)
                for model in (lora, deep):
                    remote_blocks(model).close()
                times = seconds["lora"], seconds["deep_ptune"], seconds["peft"]
                rows.append(Row(case, *times, times[0] / times[1], times[0] / times[2], moved, needed))
    print_table(
        f"LoRA step, r={rank} of {target_modules}, Llama {hidden} × {blocks}, float32, {device}, {threads} threads",
        ("batch×tokens×P", "LoRA ms", "deep_ptune ms", "PEFT ms", "/ deep_ptune", "/ PEFT", "MB", "/ needed"),
        [
            (
                row.case,
                *(f"{1e3 * each:.0f}" for each in (row.lora_seconds, row.deep_ptune_seconds, row.peft_seconds)),
                f"{row.by_deep_ptune:.2f}", f"{row.by_peft:.2f}", f"{row.bytes_moved / 1e6:.2f}",
                f"{row.bytes_moved / row.bytes_needed:.3f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    save_rows([row._asdict() for row in rows], output)


def by_peft(folder: str, config: LoraConfig) -> Any:
    """PEFT's classifier with that LoRA, whole in this process."""
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return get_peft_model(model, config).eval()  # as our frozen blocks; there is no dropout anyway


if __name__ == "__main__":
    typer.run(main)
