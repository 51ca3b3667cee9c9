"""What int8 and nf4 weights cost in precision and save in memory, and where bitsandbytes' own modules differ.

    python -m benchmarks.quantization /work/smollm2 --data ../shared/data/dialogue/self_dialogue/test.jsonl

First table: two servers that hold a causal language model between them, with deep prompts on the client, beside one
process of transformers and bitsandbytes with the same weights, dequantised. Errors are relative: the norm of the
difference by the norm. "By rounding": how much the local gradient of deep prompts itself changes if prompts change by
1e-7. Perplexity is that of the texts without prompts.

Second table: the same weights in bitsandbytes' own modules, in float32. "Blocks": each block gets what enters it in the
model that is not quantised, and the same gradient of its output; means over blocks. "Model": gradient of the embeddings
of the whole model's loss. Cosines are with what is not quantised; the error is that of the gradient to a block with the
same weights, dequantised.

Third table: what audits meet in a swarm of several kinds. Consecutive blocks with and without quantised weights get the
same inputs and gradients; differences are relative to the norm, the largest over places in the model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.options import Output
from benchmarks.rounds import print_table, save_rows
from benchmarks.servers import even_spans
from petals_lightning.client.validation import disagreement
from petals_lightning.hf import Checkpoint, block_bytes, find_blocks
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.decoder import model_class
from petals_lightning.models import AutoDistributedModelForCausalLM, prompts_of
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.starts import PromptInit
from petals_lightning.protocol.quant_types import QUANT_TYPES, UNQUANTIZED
from petals_lightning.sample import DIALOGUES_DIR, MODEL_DIR
from tools.testing.swarms import InProcessSwarm
from tools.testing.tensors import relative_error

OWN_MODULES: dict[str, dict[str, Any]] = {
    "int8, LLM.int8()": {"load_in_8bit": True},
    "int8, LLM.int8() without outliers": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


def bitsandbytes_model(folder: str, settings: dict[str, Any]) -> Any:
    """The model as transformers loads it by bitsandbytes, its blocks quantised and the rest in float32."""
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=["lm_head"])
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def settings_of(quant_type: str) -> dict[str, Any]:
    return next(settings for name, settings in OWN_MODULES.items() if name.startswith(quant_type))


def batches(folder: str, data: Path, texts: int, tokens: int, batch_size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Dialogues, one a sample, padded on the right; the loss ignores padding."""
    tokenizer = Checkpoint(folder).tokenizer()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:texts]]
    ids = [tokenizer("\n".join(_turns(row)))["input_ids"][:tokens] for row in rows]
    made = []
    for start in range(0, len(ids), batch_size):
        some = [torch.tensor(each) for each in ids[start : start + batch_size]]
        padded = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(each) for each in some])
        mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
        made.append({
            "input_ids": padded, "attention_mask": mask.long(), "labels": padded.masked_fill(~mask, -100),
        })  # fmt: skip
    return made


def _turns(row: dict[str, Any]) -> list[str]:
    turns = row.get("turns") or row.get("messages") or []
    return [turn if isinstance(turn, str) else turn["content"] for turn in turns]


@torch.no_grad()
def perplexity(model: Any, given: list[dict[str, torch.Tensor]]) -> float:
    losses, counts = [], []
    for batch in given:
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        losses.append(model(**batch).loss.item() * counts[-1])
    return math.exp(sum(losses) / sum(counts))


def passes(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits at the tokens, and the gradients of prompts."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    prompts = prompts_of(model)
    logits = out.logits[batch["attention_mask"].bool()].detach()
    return {"logits": logits, "input": prompts.input.grad.clone(), "deep": prompts.deep.grad.clone()}


def through_servers(
    folder: str, given: list[dict[str, torch.Tensor]], prefix: int, init: PromptInit, plain_bytes: int
) -> Iterator[dict[str, Any]]:
    """A row per kind of weights."""
    for kind in QUANT_TYPES:
        torch.manual_seed(0)
        local = LocalModelForCausalLM.from_pretrained(
            folder, tuning_mode="deep_ptune", pre_seq_len=prefix, prompt_init=init, dtype="float32"
        )
        with torch.no_grad():
            prompts_of(local).deep.normal_(0, 0.1)
        if kind != UNQUANTIZED:
            theirs = bitsandbytes_model(folder, settings_of(kind)).dequantize()
            blocks = find_blocks(theirs).blocks(theirs)
            for path, linear in blocks.named_modules():
                if isinstance(linear, nn.Linear):
                    find_blocks(local).blocks(local).get_submodule(path).weight = linear.weight.requires_grad_(False)
        spans = even_spans(Checkpoint(folder).config.num_hidden_layers, 2)
        with InProcessSwarm(folder, spans, dtype="float32", quant_types=[kind] * 2) as swarm:
            tuned = swarm.load(
                AutoDistributedModelForCausalLM, tuning_mode="deep_ptune", pre_seq_len=prefix, dtype="float32"
            )
            prompts_of(tuned).load_state_dict(prompts_of(local).state_dict())
            got, wanted = passes(tuned, given[0]), passes(local, given[0])
            held = sum(server.span.weight_bytes(*span) for server, span in zip(swarm.servers, spans, strict=True))
            untuned = swarm.load(AutoDistributedModelForCausalLM, dtype="float32")
            yield {
                "weights": kind, "bytes": held, "share": held / plain_bytes, "perplexity": perplexity(untuned, given),
                **{name: relative_error(got[name], wanted[name]) for name in wanted},
                "rounding": relative_error(_slightly_changed(local, given[0])["deep"], wanted["deep"]),
            }  # fmt: skip


def _slightly_changed(local: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of prompts that differ by the rounding of float32: how exact any two programs can be."""
    torch.manual_seed(1)
    with torch.no_grad():
        for prompts in (prompts_of(local).input, prompts_of(local).deep):
            prompts.mul_(1 + 1e-7 * torch.randn_like(prompts))
    return passes(local, batch)


@contextmanager
def recorded(model: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collects what enters each block meanwhile."""
    entered: list[Any] = []
    blocks = find_blocks(model).blocks(model)
    hooks = [
        block.register_forward_pre_hook(lambda module, *given: entered.append(given), with_kwargs=True)
        for block in blocks
    ]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def block_gradient(block: nn.Module, given: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    passes = span_passes([block], [given], grad)
    return passes["output"], passes["gradient"]


def embedding_gradient(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    return torch.autograd.grad(loss, embeds)[0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def in_one_process(folder: str, batch: dict[str, torch.Tensor], random: dict[str, torch.Tensor]) -> Iterator[Any]:
    """A row per kind of weights, in bitsandbytes' own modules in both modes, and dequantised."""
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    with recorded(plain) as entered, torch.no_grad():
        plain(**batch, use_cache=False)
    torch.manual_seed(0)
    grads = [torch.randn_like(args[0]) for args, _ in entered]
    expected = [
        block_gradient(block, given, grad)
        for block, given, grad in zip(find_blocks(plain).blocks(plain), entered, grads, strict=True)
    ]
    wholes = [embedding_gradient(plain, each) for each in (batch, random)]
    for name, settings in OWN_MODULES.items():
        own = bitsandbytes_model(folder, settings).requires_grad_(False)
        same = copy.deepcopy(own).dequantize().eval()
        same_grads = [
            block_gradient(block, given, grad)[1]
            for block, given, grad in zip(find_blocks(same).blocks(same), entered, grads, strict=True)
        ]
        for mode, model in (("dequantised", same), ("own modules, eval", own), ("own modules, train", own)):
            model.train(mode.endswith("train"))
            found = [
                block_gradient(block, given, grad)
                for block, given, grad in zip(find_blocks(model).blocks(model), entered, grads, strict=True)
            ]
            count = len(found)
            yield {
                "weights": name, "modules": mode,
                "output": sum(relative_error(a[0], b[0]) for a, b in zip(found, expected, strict=True)) / count,
                "gradient": sum(cosine(a[1], b[1]) for a, b in zip(found, expected, strict=True)) / count,
                "gradient_error": sum(relative_error(a[1], b) for a, b in zip(found, same_grads, strict=True)) / count,
                "texts": cosine(embedding_gradient(model, batch), wholes[0]),
                "random_tokens": cosine(embedding_gradient(model, random), wholes[1]),
            }  # fmt: skip


def between_kinds(folder: str, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """How far answers of servers differ whose weights are of different kinds: a row per kind and number of blocks."""
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    with recorded(plain) as entered, torch.no_grad():
        plain(**batch, use_cache=False)
    torch.manual_seed(0)
    grad = torch.randn_like(entered[0][0][0])
    for kind in QUANT_TYPES:
        if kind == UNQUANTIZED:
            continue
        packed = bitsandbytes_model(folder, settings_of(kind)).dequantize().eval().requires_grad_(False)
        blocks, other = find_blocks(plain).blocks(plain), find_blocks(packed).blocks(packed)
        for count in sorted({1, len(blocks) // 4, len(blocks) // 2, len(blocks)} - {0}):
            starts = range(0, len(blocks) - count + 1, max(1, (len(blocks) - count) // 5))
            spans = [slice(start, start + count) for start in starts]
            found = [[span_passes(side[span], entered[span], grad) for side in (blocks, other)] for span in spans]
            yield {
                "weights": kind, "blocks": count,
                **{name: max(disagreement({name: a[name]}, {name: b[name]}) for a, b in found) for name in found[0][0]},
            }  # fmt: skip


def span_passes(blocks: Any, entered: list[Any], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of consecutive blocks and the gradient of what enters the first one."""
    hidden = leaf = entered[0][0][0].detach().requires_grad_()
    for block, (args, kwargs) in zip(blocks, entered, strict=True):
        hidden = block(hidden, *args[1:], **kwargs)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return {"output": hidden.detach(), "gradient": torch.autograd.grad(hidden, leaf, grad)[0]}


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model.")] = MODEL_DIR,
    data: Annotated[Path, typer.Option(help="Dialogues, a JSON object a line.")] = DIALOGUES_DIR / "test.jsonl",
    texts: int = 64,
    tokens: Annotated[int, typer.Option(help="of a text, at most")] = 128,
    prefix: Annotated[int, typer.Option(help="P, virtual tokens")] = 8,
    init: Annotated[str, typer.Option(help="Start of input prompts: vocabulary or random.")] = "vocabulary",
    output: Output = None,
) -> None:
    """Prints the tables."""
    folder = str(model)
    given = batches(folder, data, texts, tokens)
    checkpoint = Checkpoint(folder)
    plain_bytes = sum(block_bytes(model_class(AutoModel, checkpoint), checkpoint, "bfloat16"))
    served = list(through_servers(folder, given, prefix, cast("PromptInit", init), plain_bytes))
    print_table(
        f"{model.name}, two servers",
        ("weights", "MB", "of bfloat16", "perplexity", "logits", "grad input prompts", "deep prompts", "by rounding"),
        [
            (
                row["weights"], f"{row['bytes'] / 1e6:.1f}", f"{row['share']:.3f}", f"{row['perplexity']:.2f}",
                *(f"{row[name]:.1e}" for name in ("logits", "input", "deep", "rounding")),
            )
            for row in served
        ],
    )  # fmt: skip
    batch = {name: tensor[:4] for name, tensor in given[0].items()}
    torch.manual_seed(0)
    ids = torch.randint(1, checkpoint.config.vocab_size, batch["input_ids"].shape)
    local = list(
        in_one_process(
            folder, batch, {**batch, "input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        )
    )
    print_table(
        "bitsandbytes' modules in float32",
        ("weights", "modules", "output error", "grad cosine", "grad error", "model: texts", "random tokens"),
        [
            (
                row["weights"], row["modules"], f"{row['output']:.1e}", f"{row['gradient']:.4f}",
                f"{row['gradient_error']:.1e}", f"{row['texts']:.3f}", f"{row['random_tokens']:.3f}",
            )
            for row in local
        ],
    )  # fmt: skip
    mixed = list(between_kinds(folder, batch))
    print_table(
        "Servers of this kind beside servers that do not quantise, the largest difference",
        ("weights", "blocks", "output", "gradient"),
        [(row["weights"], str(row["blocks"]), f"{row['output']:.3f}", f"{row['gradient']:.3f}") for row in mixed],
    )
    save_rows([*served, *local, *mixed], output)


if __name__ == "__main__":
    typer.run(main)
