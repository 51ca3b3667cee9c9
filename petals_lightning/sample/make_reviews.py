"""Write the labelled reviews: ``python -m petals_lightning.sample.make_reviews [--output-dir DIR]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from petals_lightning.sample import REVIEWS_DIR
from petals_lightning.sample.grammar import OTHER_WORDS, TRAIN_WORDS, labelled_reviews

SEED = 2023
SIZES = {"train": 2000, "validation": 600, "test": 600}


def make_splits(seed: int = SEED) -> dict[str, list[dict]]:
    """The rows of each split; no review is in two of them, only ``train`` uses the training opinion words."""
    splits: dict[str, list[dict]] = {}
    for offset, (name, size) in enumerate(SIZES.items()):
        lexicon = TRAIN_WORDS if name == "train" else OTHER_WORDS
        seen = [row["sentence"] for rows in splits.values() for row in rows]
        splits[name] = labelled_reviews(seed + offset, size, lexicon, exclude=seen)
    return splits


def write_splits(output_dir: Path, seed: int = SEED) -> None:
    """Write ``<split>.jsonl`` files, one ``{"sentence": ..., "label": ...}`` a line, to ``output_dir``."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in make_splits(seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=REVIEWS_DIR)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write_splits(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
