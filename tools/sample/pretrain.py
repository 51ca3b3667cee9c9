"""Pretrains the bundled language model: `python -m tools.sample.pretrain [--output-dir DIR]`.

The model is a Llama of 4 blocks, 128 wide, over words. It is trained on nothing but documents of `grammar.corpus`:
generated clauses and reviews that are followed by verdicts, and some reviews with a question before them. No text by
people is in it. The reviews of `reviews/*.jsonl` are not in the corpus as whole texts, their opinion words are.

The checkpoint is written in several shards, as that of a large model, so that a server that holds some blocks
reads only their shards.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from petals_lightning.sample import MODEL_DIR
from tools.sample.grammar import corpus, vocabulary
from tools.sample.make_reviews import make_splits

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
MAX_TOKENS = 256
SEED = 1
STEPS = 800
LEARNING_RATE = 6e-3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token for each word of the grammar; each text begins with `<s>`.

    Words are split as in SST-2, so that "doesn't it?" and "does n't it ?" give the same tokens.
    """
    vocab = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"(?<=\w)n't\b"), " n't")]
    )
    word = Regex(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+|--|\.\.\.|``|''|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, blocks: int = 4) -> LlamaForCausalLM:
    """A Llama for the tokenizer's vocabulary with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=blocks,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], batch_size: int) -> Iterator[torch.Tensor]:
    """Token ids [B, S] of `documents`, grouped by length to save padding, each with `</s>` at its end."""
    while pool := list(islice(documents, 50 * batch_size)):
        ids = sorted(([*ids, tokenizer.eos_token_id] for ids in tokenizer(pool)["input_ids"]), key=len)
        groups = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        for index in torch.randperm(len(groups)).tolist():
            group = groups[index]
            batch = torch.full((len(group), len(group[-1])), tokenizer.pad_token_id)
            for row, tokens in enumerate(group):
                batch[row, : len(tokens)] = torch.tensor(tokens)
            yield batch


def train(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    steps: int,
    learning_rate: float,
    minutes: float | None = None,
) -> float:
    """Trains in place on a cosine schedule; returns the mean loss of the last 50 steps (nats a token).

    Args:
        model: is trained.
        data: token ids [B, S] of each step.
        steps: of training.
        learning_rate: the highest.
        minutes: end after this time at the latest; the schedule is shortened to fit.
    """
    pad: int = model.config.pad_token_id  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    losses: list[float] = []
    start = time.monotonic()
    model.train()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("pretraining", total=steps, loss=math.nan)
        for step in range(steps):
            done = step / steps
            if minutes is not None:
                done = max(done, (time.monotonic() - start) / (60 * minutes))
            if done >= 1:
                break
            decay = 0.02 + 0.98 * math.cos(math.pi / 2 * done) ** 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (step + 1) / 100) * decay
            ids = next(data)
            loss = model(ids, labels=ids.masked_fill(ids == pad, -100)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="end after this time at the latest")
    parser.add_argument("--batch-size", type=int, default=64, help="documents a step")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums that are split among threads give other bits on other machines
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.hidden_size, args.blocks)
    labelled = {row["sentence"] for rows in make_splits().values() for row in rows}
    start = time.monotonic()
    documents = batches(tokenizer, corpus(args.seed, labelled), args.batch_size)
    loss = train(model, documents, args.steps, LEARNING_RATE, args.minutes)
    seconds = time.monotonic() - start
    model.save_pretrained(args.output_dir, max_shard_size="600KB")
    tokenizer.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, loss {loss:.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
