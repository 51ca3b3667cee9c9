"""What each wire dtype costs in precision and saves in bytes: one training step through two servers and locally.

    python -m benchmarks.wire_precision                                        # a random Llama of hidden 512, 8 blocks
    python -m benchmarks.wire_precision --model ../shared/data/models/stories260K --random-prompts 1.0

All sides have the same prompts and head and are given the same batches; what is compared is the loss and the gradients
of what trains, with those of plain Hugging Face in one process (relative: the norm of the difference by the norm).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import save_rows
from benchmarks.training_step import PREFIX, save_random_llama, start_server
from petals_lightning.client import ClientConfig
from petals_lightning.hf import Checkpoint
from petals_lightning.models import AutoDistributedModelForSequenceClassification, prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification

WIRE_DTYPES = ("float32", "bfloat16", "float16", "int8_blockwise")


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a step's loss, by what they are for; and the loss itself. Prompts change from step to step, as in training."""
    prompts = prompts_of(model)
    with torch.no_grad():
        prompts.deep.mul_(0.99)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {
        "loss": loss.detach(), "input": prompts.input.grad, "deep": prompts.deep.grad, "head": model.score.weight.grad,
    }  # fmt: skip


def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a causal language model; default: a random one.")
    ] = None,
    case: Annotated[str, typer.Option(help="batch×tokens×P")] = "16x64x16",
    random_prompts: Annotated[float, typer.Option(help="Deep prompts are drawn from N(0, this²).")] = 0.1,
    batches: int = 3,
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per wire dtype: bytes of a step, and the mean errors of loss and gradients."""
    batch_size, tokens, pre_seq_len = (int(part) for part in case.split("x"))
    torch.manual_seed(0)
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": pre_seq_len, "num_labels": 2, "pad_token_id": 0}
    rows = []
    with tempfile.TemporaryDirectory() as random_model:
        if model is None:
            save_random_llama(random_model, hidden=512, blocks=8, dtype="float32")
        folder = str(model or random_model)
        config = Checkpoint(folder).config
        middle = config.num_hidden_layers // 2
        first, maddr = start_server(folder, 1, "--block-indices", f"0:{middle}")
        second, _ = start_server(
            folder, 1, "--block-indices", f"{middle}:{config.num_hidden_layers}", join=("--initial-peers", maddr)
        )
        try:
            local = LocalModelForSequenceClassification.from_pretrained(folder, **options)
            with torch.no_grad():
                prompts_of(local).deep.normal_(0, random_prompts)
            drawn = [
                {
                    "input_ids": (ids := torch.randint(1, config.vocab_size, (batch_size, tokens))),
                    "attention_mask": torch.ones_like(ids),
                    "labels": torch.randint(0, 2, (batch_size,)),
                }
                for _ in range(batches)
            ]
            start = {name: tensor.clone() for name, tensor in prompts_of(local).state_dict().items()}
            wanted = [gradients(local, batch) for batch in drawn]
            for wire_dtype in WIRE_DTYPES:
                remote = AutoDistributedModelForSequenceClassification.from_pretrained(
                    folder,
                    initial_peers=[maddr],
                    dht_prefix=PREFIX,
                    **options,
                    client_config=ClientConfig(wire_dtype=wire_dtype, hedge_factor=None),  # a hedge's bytes are others
                )
                prompts_of(remote).load_state_dict(start)
                remote.score.load_state_dict(local.score.state_dict())
                got = [gradients(remote, batch) for batch in drawn]
                stats = remote_blocks(remote).stats
                row: dict[str, Any] = {"wire_dtype": wire_dtype}
                row["bytes_per_step"] = (stats.bytes_sent + stats.bytes_received) / batches
                for name in wanted[0]:
                    errors = [relative_error(a[name], b[name]) for a, b in zip(got, wanted, strict=True)]
                    row[name] = sum(errors) / batches
                rows.append(row)
                remote_blocks(remote).close()
        finally:
            for server in (second, first):
                server.terminate()
                server.wait()
    table = Table(title=f"{model.name if model is not None else 'random Llama 512 × 8'}, 2 servers, {case}, deep_ptune")
    for column in ("wire", "MB a step", "loss", "grad input prompts", "grad deep prompts", "grad head"):
        table.add_column(column, justify="left" if column == "wire" else "right")
    for row in rows:
        errors = [f"{row[name]:.1e}" for name in ("loss", "input", "deep", "head")]
        table.add_row(row["wire_dtype"], f"{row['bytes_per_step'] / 1e6:.3f}", *errors)
    Console().print(table)
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
