"""The bundled model and reviews: what the documentation claims about them holds."""

import json
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_lightning.sample import DIALOGUES_DIR, MODEL_DIR, PREFERENCES_DIR, REVIEWS_DIR
from tools.sample import make_dialogues, make_preferences
from tools.sample.grammar import (
    ALL_WORDS,
    LABELS,
    MAX_TOKENS,
    MIN_TOKENS,
    OTHER_WORDS,
    TRAIN_WORDS,
    corpus,
    words_of,
)
from tools.sample.make_reviews import SIZES, make_splits
from tools.sample.pretrain import build_tokenizer
from tools.sample.splits import write_splits

PARITY_WITH_THE_GRAMMAR = "run `python -m tools.sample.make_reviews` and pretrain again"


def read_split(name: str) -> list[dict]:
    return [json.loads(line) for line in (REVIEWS_DIR / f"{name}.jsonl").read_text().splitlines()]


def words_in(rows: list[dict]) -> set[str]:
    return {word for row in rows for word in row["sentence"].split()}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_grammar_gives_the_same_text_for_the_same_seed():
    first, again, other = (list(islice(corpus(seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_bundled_reviews_are_what_the_generator_makes(tmp_path):
    write_splits(make_splits(), tmp_path)
    for name in SIZES:
        made, bundled = (folder / f"{name}.jsonl" for folder in (tmp_path, REVIEWS_DIR))
        assert made.read_bytes() == bundled.read_bytes(), PARITY_WITH_THE_GRAMMAR


def read_dialogues(name: str) -> list[list[str]]:
    lines = (DIALOGUES_DIR / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["turns"] for line in lines]


def test_bundled_dialogues_are_what_the_generator_makes(tmp_path):
    write_splits(make_dialogues.make_splits(), tmp_path)
    for name, size in make_dialogues.SIZES.items():
        made, bundled = (folder / f"{name}.jsonl" for folder in (tmp_path, DIALOGUES_DIR))
        assert made.read_bytes() == bundled.read_bytes(), "run `python -m tools.sample.make_dialogues`"
        assert len(read_dialogues(name)) == size


def test_bundled_preferences_are_what_the_generator_makes(tmp_path):
    write_splits(make_preferences.make_splits(), tmp_path)
    for name, size in make_preferences.SIZES.items():
        made, bundled = (folder / f"{name}.jsonl" for folder in (tmp_path, PREFERENCES_DIR))
        assert made.read_bytes() == bundled.read_bytes(), "run `python -m tools.sample.make_preferences`"
        rows = [json.loads(line) for line in bundled.read_text().splitlines()]
        assert len(rows) == size
        for row in rows:
            ((_, *answers),) = (asked for asked in make_dialogues.QUESTIONS if row["prompt"].endswith(asked[0]))
            assert {row["chosen"], row["rejected"]} == set(answers)


def test_answers_follow_from_the_conversation(tokenizer):
    """The last review tells the side, the question the form; opinion words are split as those of the reviews are."""
    for name in make_dialogues.SIZES:
        own = words_of(TRAIN_WORDS if name == "train" else OTHER_WORDS)
        for turns in read_dialogues(name):
            label = None
            for said, answer in zip(turns[::2], turns[1::2], strict=True):
                ((question, *answers),) = (row for row in make_dialogues.QUESTIONS if said.endswith(row[0]))
                telling = set(said.removesuffix(question).split())
                if telling:
                    assert telling & words_of(ALL_WORDS) <= own
                    (label,) = (side for side in LABELS if telling & words_of(ALL_WORDS, side))
                assert label is not None
                assert answer == answers[label]
                assert tokenizer.unk_token_id not in tokenizer(f"{said} {answer}")["input_ids"]


@pytest.mark.parametrize("name", SIZES)
def test_splits_are_balanced_and_short(name):
    rows = read_split(name)
    assert len(rows) == SIZES[name]
    assert [sum(row["label"] == label for row in rows) for label in LABELS] == [len(rows) // 2] * 2
    assert all(MIN_TOKENS <= len(row["sentence"].split()) <= MAX_TOKENS for row in rows)
    assert all(row["sentence"] == row["sentence"].lower() for row in rows)


def test_no_review_is_in_two_splits_or_a_whole_text_of_the_corpus():
    sentences = [row["sentence"] for name in SIZES for row in read_split(name)]
    assert len(set(sentences)) == len(sentences)
    # Whole texts only: a labelled review of one clause may be the last clause of a longer text, as the card says.
    for question_rate in (0.0, 1.0):
        documents = islice(corpus(0, set(sentences), question_rate), 1000)
        texts = {f"{text} ." for document in documents for text in document.removesuffix(" .").split(" . ")}
        assert texts.isdisjoint(sentences)


def test_evaluation_uses_no_opinion_word_of_the_training_labels():
    opinions = words_of(ALL_WORDS)
    train = words_in(read_split("train")) & opinions
    assert train == words_of(TRAIN_WORDS)
    for name in ("validation", "test"):
        used = words_in(read_split(name)) & opinions
        assert used
        assert used.isdisjoint(train)


@pytest.mark.parametrize("label", LABELS)
def test_opinion_words_share_no_root_with_the_other_set(label):
    train, other = words_of(TRAIN_WORDS, label), words_of(OTHER_WORDS, label)
    assert len(train) == 24
    assert len(other) >= 60
    for a in train:
        for b in other:
            length = min(5, len(a), len(b))
            assert a[:length] != b[:length], (a, b)


@pytest.mark.parametrize("name", SIZES)
def test_a_review_has_opinion_words_of_its_own_side_only(name):
    for row in read_split(name):
        words = set(row["sentence"].split())
        assert words & words_of(ALL_WORDS, row["label"])
        assert not words & words_of(ALL_WORDS, 1 - row["label"])


def test_tokenizer_knows_every_word_of_the_reviews(tokenizer):
    sentences = [row["sentence"] for name in SIZES for row in read_split(name)]
    for sentence, ids in zip(sentences, tokenizer(sentences)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == sentence


def test_tokenizer_splits_raw_text_as_sst2_does(tokenizer):
    assert tokenizer("It doesn't work, does it?")["input_ids"] == tokenizer("it does n't work , does it ?")["input_ids"]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "right"


def test_bundled_tokenizer_is_what_the_grammar_makes(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab(), PARITY_WITH_THE_GRAMMAR


def test_checkpoint_is_sharded_and_small():
    weight_map = json.loads((MODEL_DIR / "model.safetensors.index.json").read_text())["weight_map"]
    shards = set(weight_map.values())
    assert len(shards) >= 6
    assert {path.name for path in MODEL_DIR.glob("*.safetensors")} == shards
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 8 * 2**20


def test_model_knows_the_verdict_on_held_out_reviews(tokenizer):
    rows = read_split("validation")[:100]
    loaded: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tokenizer([row["sentence"] + " my verdict :" for row in rows], padding=True, return_tensors="pt")
    last = batch["attention_mask"].sum(1) - 1
    with torch.no_grad():
        logits = model(**batch).logits[torch.arange(len(rows)), last]
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    said_yes = logits[:, yes] > logits[:, no]
    accuracy = (said_yes == torch.tensor([row["label"] == 1 for row in rows])).float().mean()
    assert accuracy > 0.9
