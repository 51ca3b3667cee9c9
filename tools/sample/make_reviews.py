"""Writes the labelled reviews: `python -m tools.sample.make_reviews [--output-dir DIR]`."""

from __future__ import annotations

from petals_lightning.sample import REVIEWS_DIR
from tools.sample.grammar import OTHER_WORDS, TRAIN_WORDS, labelled_reviews
from tools.sample.splits import write_from_command_line

SEED = 2023
SIZES = {"train": 2000, "validation": 600, "test": 600}


def make_splits(seed: int = SEED) -> dict[str, list[dict]]:
    """The rows of each split; no review is in two of them, only `train` uses the training opinion words."""
    splits: dict[str, list[dict]] = {}
    for offset, (name, size) in enumerate(SIZES.items()):
        lexicon = TRAIN_WORDS if name == "train" else OTHER_WORDS
        seen = [row["sentence"] for rows in splits.values() for row in rows]
        splits[name] = labelled_reviews(seed + offset, size, lexicon, exclude=seen)
    return splits


if __name__ == "__main__":
    write_from_command_line(__doc__ or "", make_splits, REVIEWS_DIR, SEED)
