"""Writes the preferences: `python -m tools.sample.make_preferences [--output-dir DIR]`.

A user tells of something in a review (`grammar.review`) and asks one of the questions of `make_dialogues`. The chosen
answer follows from the review, the rejected one is the answer after a review of the other kind.

Opinion words are split as those of the dialogues are.
"""

from __future__ import annotations

from random import Random

from petals_lightning.sample import PREFERENCES_DIR
from tools.sample.grammar import LABELS, OTHER_WORDS, TRAIN_WORDS, Lexicon, review
from tools.sample.make_dialogues import QUESTIONS
from tools.sample.splits import write_from_command_line

SEED = 2026
SIZES = {"train": 600, "validation": 150, "test": 150}


def preference(rng: Random, lexicon: Lexicon) -> dict[str, str]:
    """One row."""
    label, (question, *answers) = rng.choice(LABELS), rng.choice(QUESTIONS)
    prompt = f"{review(rng, label, lexicon)} {question}"
    return {"prompt": prompt, "chosen": answers[label], "rejected": answers[1 - label]}


def make_splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The rows of each split; only `train` uses the training opinion words."""
    splits = {}
    for offset, (name, size) in enumerate(SIZES.items()):
        rng, lexicon = Random(seed + offset), TRAIN_WORDS if name == "train" else OTHER_WORDS
        splits[name] = [preference(rng, lexicon) for _ in range(size)]
    return splits


if __name__ == "__main__":
    write_from_command_line(__doc__ or "", make_splits, PREFERENCES_DIR, SEED)
