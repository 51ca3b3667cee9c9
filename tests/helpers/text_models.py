"""A tiny random Llama with a word-level tokenizer, and a few labelled texts that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import TINY_CONFIGS, VOCAB, save_tiny_checkpoint

WORDS = [f"w{number}" for number in range(VOCAB - 3)]
GOOD, BAD, NEUTRAL = WORDS[:10], WORDS[10:20], WORDS[20:60]


def save_tiny_text_model(folder: Path) -> Path:
    """A 4-block random Llama and its tokenizer in `folder`."""
    save_tiny_checkpoint(TINY_CONFIGS["llama"](), folder)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_texts(path: Path, rows: int, *, seed: int = 0, label: str = "label") -> Path:
    """A jsonl file of `rows` texts of 3 to 12 words; the label tells whether a good or a bad word is among them."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            positive = draw.random() < 0.5
            words = draw.choices(NEUTRAL, k=draw.randint(2, 11))
            words.insert(draw.randint(0, len(words)), draw.choice(GOOD if positive else BAD))
            print(json.dumps({"sentence": " ".join(words), label: int(positive)}), file=file)
    return path


def write_dataset(folder: Path, *, train: int = 40, validation: int = 16, test: int = 16) -> Path:
    """A folder with train, validation and test files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, rows) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        write_texts(folder / f"{split}.jsonl", rows, seed=seed)
    return folder
