"""Writes the dialogues: `python -m tools.sample.make_dialogues [--output-dir DIR]`.

A user tells of something in a review (`grammar.review`) and asks a question; an assistant answers. The question fixes
the form of the answer, the review its content, so every word of the assistant follows from the conversation before it.
Later turns of the user bring another review, or ask another question about the last one: that answer depends on a turn
further back.

Training dialogues use `grammar.TRAIN_WORDS` only, validation and test only the other opinion words: what a tuned model
gets right there of what the user liked, it has from the language model.
"""

from __future__ import annotations

from random import Random

from petals_lightning.sample import DIALOGUES_DIR
from tools.sample.grammar import LABELS, OTHER_WORDS, TRAIN_WORDS, Lexicon, review
from tools.sample.splits import write_from_command_line

SEED = 2024
SIZES = {"train": 1200, "validation": 150, "test": 150}
MAX_EXCHANGES = 4
# The user's question; the assistant's answer to it after a negative and after a positive review.
QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("what is your verdict ?", "my verdict : no .", "my verdict : yes ."),
    ("what is your rating ?", "my rating : negative .", "my rating : positive ."),
    ("is it thumbs up or down ?", "thumbs down .", "thumbs up ."),
    ("are you happy or unhappy ?", "it left me unhappy .", "it left me happy ."),
    ("what is it overall ?", "overall i hated it .", "overall i loved it ."),
    ("do you recommend it ?", "do i recommend it ? no .", "do i recommend it ? yes ."),
)


def dialogue(rng: Random, lexicon: Lexicon) -> list[str]:
    """The turns of one dialogue, of the user and the assistant in turn: 1 to `MAX_EXCHANGES` exchanges."""
    turns: list[str] = []
    label, left = 0, list(QUESTIONS)
    for number in range(rng.randint(1, MAX_EXCHANGES)):
        telling = ""
        if number == 0 or rng.random() < 0.5:
            label, left = rng.choice(LABELS), list(QUESTIONS)
            telling = review(rng, label, lexicon) + " "
        question, *answers = left.pop(rng.randrange(len(left)))  # no question comes twice about the same review
        turns += [telling + question, answers[label]]
    return turns


def make_splits(seed: int = SEED) -> dict[str, list[dict[str, list[str]]]]:
    """The rows of each split; only `train` uses the training opinion words."""
    splits = {}
    for offset, (name, size) in enumerate(SIZES.items()):
        rng, lexicon = Random(seed + offset), TRAIN_WORDS if name == "train" else OTHER_WORDS
        splits[name] = [{"turns": dialogue(rng, lexicon)} for _ in range(size)]
    return splits


if __name__ == "__main__":
    write_from_command_line(__doc__ or "", make_splits, DIALOGUES_DIR, SEED)
