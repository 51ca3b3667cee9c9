"""Data of other tasks than one class per text: preferences, numbers, sets of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from petals_lightning.data import PreferenceDataModule, TextLabelSetDataModule, TextNumberDataModule
from petals_lightning.data.preferences import read_preference
from petals_lightning.errors import ConfigurationError, DataError


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [turn("user", "w1 w2")]
FORMS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}, ASKED),
    ({"prompt": ASKED, "chosen": [turn("assistant", "w3")], "rejected": [turn("assistant", "w4")]}, ASKED),
    (
        {"chosen": [*ASKED, turn("assistant", "w3")], "rejected": [*ASKED, turn("assistant", "w4")]},
        ASKED,
    ),
    (
        {"system": "w9", "prompt": "w1 w2", "chosen": "w3", "rejected": "w4"},
        [turn("system", "w9"), *ASKED],
    ),
]


@pytest.mark.parametrize(("row", "before"), FORMS, ids=["texts", "turns", "whole dialogues", "a system's text"])
def test_a_preference_is_read_in_any_form(row, before):
    chosen, rejected = read_preference(row, "row 0")
    assert chosen == [*before, turn("assistant", "w3")]
    assert rejected == [*before, turn("assistant", "w4")]


def test_pairs_are_chosen_first_and_labelled_in_their_last_answer(text_model, tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": [*ASKED, turn("assistant", "w5"), turn("user", "w6")], "chosen": "w3 w3", "rejected": "w4"},
        {"prompt": "w7", "chosen": "w8", "rejected": "w8 w9"},
    ]
    data = PreferenceDataModule(str(text_model), write(tmp_path, rows * 2), batch_size=2, validation_fraction=0.5)
    data.setup()
    batch = data.collate(0)([data._splits["train"][0], data._splits["train"][1]])
    assert batch["input_ids"].shape == batch["labels"].shape
    assert len(batch["labels"]) == 4
    tokenizer = data_tokenizer(text_model)
    for name, (ids, labels) in zip(("chosen", "rejected"), data._splits["train"][0], strict=True):
        said = tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=True).strip()
        assert said in {row[name] for row in rows}
        assert [a for a, b in zip(ids, labels, strict=True) if b != -100] == [b for b in labels if b != -100]


def data_tokenizer(model: Path) -> Any:
    from petals_lightning.data import load_tokenizer

    return load_tokenizer(str(model))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "w1", "chosen": "w2"}, r"row 0 of train .* a preference needs `chosen` and `rejected`"),
        ({"chosen": "w2", "rejected": "w3"}, "chosen must end with a turn of the assistant that follows another"),
        ({"prompt": "w1", "chosen": ASKED, "rejected": "w3"}, "chosen must end with a turn of the assistant"),
    ],
)
def test_what_is_no_preference_is_refused(row, words, text_model, tmp_path):
    with pytest.raises(DataError, match=words):
        PreferenceDataModule(str(text_model), write(tmp_path, [row] * 3)).setup()
    with pytest.raises(ConfigurationError, match="names messages; give prompt, chosen"):
        PreferenceDataModule(str(text_model), columns={"messages": "x"})


def test_numbers_are_read_and_gaps_are_named(text_model, tmp_path):
    rows = [{"text": f"w{n}", "score": value} for n, value in enumerate([0.5, -1.25, 3.0, 4.0])]
    data = TextNumberDataModule(str(text_model), write(tmp_path, rows), label_column="score")
    data.setup()
    labels = [sample["label"] for part in data._splits.values() for sample in part]
    assert sorted(labels) == [-1.25, 0.5, 3.0, 4.0]
    assert data.collate(0)([data._splits["train"][0]])["labels"].is_floating_point()
    rows[1]["score"] = None
    for drops in (False, True):
        data = TextNumberDataModule(str(text_model), write(tmp_path, rows), label_column="score", drop_unlabelled=drops)
        if drops:
            data.setup()
            assert sum(data.sizes.values()) == 3
        else:
            with pytest.raises(DataError, match=r"None \(row 1 of .*'score'\) is not a number: .*drop_unlabelled"):
                data.setup()
    words = [{"text": f"w{n}", "score": value} for n, value in enumerate(["0.5", "low", "3.0", "4.0"])]
    data = TextNumberDataModule(str(text_model), write(tmp_path, words), label_column="score", drop_unlabelled=True)
    with pytest.raises(DataError, match=r"'low' \(row 1 of .*'score'\) is not a number: correct it"):
        data.setup()
    with pytest.raises(ConfigurationError, match="num_labels=3: it is for one class per text"):
        TextNumberDataModule(str(text_model), num_labels=3)


@pytest.mark.parametrize(
    ("labels", "names", "vectors"),
    [
        ([["b", "a"], [], ["c"], ["a"]], ("a", "b", "c"), [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]),
        ([[2], [10, 2], [0], [0]], ("0", "2", "10"), [[0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 0]]),
        (["a", "b", "a", "b"], ("a", "b"), [[1, 0], [0, 1], [1, 0], [0, 1]]),
    ],
    ids=["names", "numbers", "single classes"],
)
def test_sets_of_classes_become_vectors(labels, names, vectors, text_model, tmp_path):
    folder = write(tmp_path, [{"text": f"w{n}", "label": each} for n, each in enumerate(labels)])
    (tmp_path / "validation.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    data = TextLabelSetDataModule(str(text_model), folder)
    data.setup()
    assert data.class_names == names
    assert [sample["label"] for sample in data._splits["train"]] == vectors
    assert data.collate(0)(list(data._splits["train"]))["labels"].shape == (4, len(names))


def test_a_class_that_train_lacks_is_named(text_model, tmp_path):
    folder = write(tmp_path, [{"text": "w1", "label": ["a"]}, {"text": "w2", "label": ["b"]}])
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "w3", "label": ["z"]}) + "\n")
    with pytest.raises(DataError, match=r"class 'z' of validation \(row 0 of .*\) is not one of train's: a, b"):
        TextLabelSetDataModule(str(text_model), folder).setup()
