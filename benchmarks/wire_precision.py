"""What each wire dtype costs in precision and saves in bytes: one training step through two servers and locally.

    python -m benchmarks.wire_precision                                        # a random Llama of hidden 512, 8 blocks
    python -m benchmarks.wire_precision --model ../shared/data/models/stories260K --random-prompts 1.0

All sides have the same prompts and head and are given the same batches; what is compared is the loss and the gradients
of what trains, with those of plain Hugging Face in one process (relative: the norm of the difference by the norm).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.options import Case, Output, parse_case
from benchmarks.rounds import print_table, save_rows
from benchmarks.servers import even_spans, running_chain
from benchmarks.swarm import classifier, save_random_llama
from petals_lightning.client import ClientConfig
from petals_lightning.hf import Checkpoint
from petals_lightning.models import prompts_of, remote_blocks
from petals_lightning.models.local import LocalModelForSequenceClassification
from tools.testing.tensors import relative_error

WIRE_DTYPES = ("float32", "bfloat16", "float16", "int8_blockwise")


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
    case: Case = "16x64x16",
    random_prompts: Annotated[float, typer.Option(help="Deep prompts are drawn from N(0, this²).")] = 0.1,
    batches: int = 3,
    hidden: Annotated[int, typer.Option(help="of the random model")] = 512,
    blocks: Annotated[int, typer.Option(help="of the random model")] = 8,
    output: Output = None,
) -> None:
    """Prints a row per wire dtype: bytes of a step, and the mean errors of loss and gradients."""
    batch_size, tokens, pre_seq_len = parse_case(case)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as random_model:
        if model is None:
            save_random_llama(random_model, hidden=hidden, blocks=blocks, dtype="float32")
        folder = str(model or random_model)
        config = Checkpoint(folder).config
        local: Any = LocalModelForSequenceClassification.from_pretrained(
            folder, tuning_mode="deep_ptune", pre_seq_len=pre_seq_len, num_labels=2, pad_token_id=0
        )
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
        with running_chain(folder, even_spans(config.num_hidden_layers, 2), 1) as maddr:
            for wire_dtype in WIRE_DTYPES:
                # A hedge would send bytes of its own.
                client_config = ClientConfig(wire_dtype=wire_dtype, hedge_factor=None)
                remote = classifier(folder, maddr, pre_seq_len, pad_token_id=0, client_config=client_config)
                prompts_of(remote).load_state_dict(start)
                remote.score.load_state_dict(local.score.state_dict())
                got = [gradients(remote, batch) for batch in drawn]
                stats = remote_blocks(remote).stats
                row = {"wire_dtype": wire_dtype, "bytes_per_step": (stats.bytes_sent + stats.bytes_received) / batches}
                for name in wanted[0]:
                    errors = [relative_error(a[name], b[name]) for a, b in zip(got, wanted, strict=True)]
                    row[name] = sum(errors) / batches
                rows.append(row)
                remote_blocks(remote).close()
    print_table(
        f"{model.name if model is not None else f'random Llama {hidden} × {blocks}'}, 2 servers, {case}, deep_ptune",
        ("wire", "MB a step", "loss", "grad input prompts", "grad deep prompts", "grad head"),
        [
            (
                row["wire_dtype"], f"{row['bytes_per_step'] / 1e6:.3f}",
                *(f"{row[name]:.1e}" for name in ("loss", "input", "deep", "head")),
            )
            for row in rows
        ],
    )  # fmt: skip
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
