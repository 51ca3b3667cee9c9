"""Labels become classes; what may be no class is named, or left out where that was asked for."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.data.labels import LabelEncoder
from petals_lightning.errors import ConfigurationError, DataError


def column(values: list) -> datasets.Dataset:
    return datasets.Dataset(pa.table({"label": pa.array(values)}))


def classes(values: list, **options: object) -> tuple[tuple[str, ...], list[int | None]]:
    rows = column(values)
    encoder = LabelEncoder(rows, "label", **options)  # type: ignore[arg-type]
    return encoder.names, encoder.encode(rows, "train")


def set_up(text_model: Path, source: Path, **settings: object) -> TextClassificationDataModule:
    data = TextClassificationDataModule(str(text_model), str(source), **settings)  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize(
    ("values", "names", "codes"),
    [
        (["0", "2", "1"], ("0", "1", "2"), [0, 2, 1]),
        ([" 1", "0 ", "+1"], ("0", "1"), [1, 0, 1]),
        (["1.0", "0.", "0"], ("0", "1"), [1, 0, 0]),
        ([Decimal("1.00"), Decimal("0.00")], ("0", "1"), [1, 0]),
        ([str(number) for number in range(12)], tuple(map(str, range(12))), list(range(12))),
        (["True", "FALSE", "true"], ("0", "1"), [1, 0, 1]),
        (["true", "half-true", "false"], ("false", "half-true", "true"), [2, 1, 0]),
        (["NA", "EU", "null"], ("EU", "NA", "null"), [1, 0, 2]),
        (["00", "01"], ("00", "01"), [0, 1]),
        (["1", "two"], ("1", "two"), [0, 1]),
        ([" pos", " neg"], ("neg", "pos"), [1, 0]),
    ],
)
def test_strings_mean_what_they_say(values: list, names: tuple[str, ...], codes: list[int]) -> None:
    assert classes(values) == (names, codes)


@pytest.mark.parametrize(
    ("values", "row"),
    [(["a", "b", ""], 2), (["a", " ", "b"], 1), (["0", "", "1"], 1), (["0", "1", "nan"], 2), (["NA", "1", "0"], 0),
     (["True", "False", "nan"], 2), ([0, None, 1], 1), ([0.0, 1.0, float("nan")], 2)],
)  # fmt: skip
def test_a_missing_label_is_named_or_left_out(values: list, row: int) -> None:
    with pytest.raises(DataError, match=rf"no label in train \(row {row} of train, .*drop_unlabelled=True"):
        classes(values)
    names, codes = classes(values, drop_unlabelled=True)
    assert len(names) == 2
    assert [number for number, code in enumerate(codes) if code is None] == [row]


@pytest.mark.parametrize("values", [[0, -1, 1], ["0", "-1", "1"], ["a", "-1", "b"], [0.0, -1.0, 1.0]])
def test_minus_one_is_no_class_unless_it_is_named(values: list) -> None:
    message = r"label -1 in train \(row 1 of train, .*drop_unlabelled=True, or name .* with label_map"
    with pytest.raises(DataError, match=message):
        classes(values)
    assert classes(values, drop_unlabelled=True)[1] == [0, None, 1]
    assert len(classes(values, label_map={-1: "2"})[0]) == 3


def test_minus_one_and_one_are_told_to_become_zero_and_one() -> None:
    for values in ([1, -1, 1], ["+1", "-1", "1"], [1.0, -1.0, 1.0]):
        for drop in (False, True):
            with pytest.raises(DataError, match=r"-1 and 1, but classes count from 0: set label_map=\{-1: 0\}"):
                classes(values, drop_unlabelled=drop)
        assert classes(values, label_map={-1: 0}) == (("0", "1"), [1, 0, 1])


def test_a_label_map_renames_joins_and_removes() -> None:
    assert classes([5, 1, 5], label_map={1: 0, 5: 1}) == (("0", "1"), [1, 0, 1])
    assert classes(["y", "n", "?"], label_map={"y": "yes", "n": "no", "?": None}, drop_unlabelled=True) == (
        ("no", "yes"), [1, 0, None],
    )  # fmt: skip
    assert classes(["0.5", "1.5"], label_map={0.5: "low", 1.5: "high"}) == (("high", "low"), [1, 0])


@pytest.mark.parametrize(
    ("one", "other"), [("pos ", "pos"), ("Pos", "pos"), ("so  so", "so so"), ("cafe\u0301", "café")]
)
def test_spellings_of_one_name_are_told_about(one: str, other: str) -> None:
    values = ["neg", other, one, other]
    with pytest.raises(DataError, match=r"differ in case or blanks only") as raised:
        classes(values)
    said = str(raised.value)
    assert f"{one!r} (row 2 of train)" in said
    assert f"{other!r} (row 1 of train)" in said
    assert f"label_map={ {one.strip(): other} }" in said
    assert classes(values, label_map={one.strip(): other}) == classes(["neg", *[other] * 3])


def test_spellings_may_be_classes_of_their_own() -> None:
    assert classes(["us", "US"], label_map={"US": "US"}) == (("US", "us"), [1, 0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.5", "1.5"], r"label 0\.5 \(row 0 of train, .*neither a whole number nor a name"),
        ([[0, 1], [1, 0]], r"label \[0, 1\] \(row 0 of train, .*neither a whole number nor a name"),
        ([0, 123456789], r"label 123456789 \(row 1 of train, .*label_column"),
        (["2019", "2020"], r"label 2020 \(row 1 of train, .*2021 classes, but 2 occur: set num_labels=2021"),
        ([4, 0, 4], r"label 4 \(row 0 of train, .*5 classes, but 2 occur: set num_labels=5"),
        (["", ""], r"no label in train \(row 0 of train"),
        (["a", "a"], "one class only"),
        ([0, 1, -2], r"label -2 \(row 2 of train, .* is outside 0…1"),
    ],
)
def test_what_is_no_class_names_its_row(values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes(values)


def test_gaps_in_numbers_are_kept_where_half_of_the_classes_occur_or_their_number_is_given() -> None:
    assert classes([3, 1, 0]) == (("0", "1", "2", "3"), [3, 1, 0])
    assert classes([4, 0], num_labels=5)[1] == [4, 0]
    assert classes([4, 0], label_map={4: 1})[1] == [1, 0]


@pytest.mark.parametrize("train", [[True, False], ["True", "False"], ["true", "false"], [1, 0], [1.0, 0.0]])
@pytest.mark.parametrize("other", [[True, False], ["TRUE", "false"], ["1.0", "0"], [1, 0]])
def test_false_and_true_are_zero_and_one_however_a_part_writes_them(train: list, other: list) -> None:
    encoder = LabelEncoder(column(train), "label")
    assert encoder.encode(column(train), "train") == encoder.encode(column(other), "validation") == [1, 0]
    for label_map in ({train[0]: "yes", train[1]: "no"}, {1: "yes", 0: "no"}):
        assert classes(train, label_map=label_map) == (("no", "yes"), [1, 0])


def test_truth_values_of_mixed_shards_are_zero_and_one(tmp_path: Path, text_model: Path) -> None:
    shards = [
        '{"text": "w1", "label": true}\n{"text": "w1 w2", "label": false}\n',
        '{"text": "w1", "label": "True"}\n{"text": "w1 w2", "label": 0}\n',
        '{"text": "w1", "label": 1}\n{"text": "w1 w2", "label": "false"}\n',
    ]
    for number, text in enumerate(shards):
        (tmp_path / f"train-{number}-of-3.jsonl").write_text(text)
    (tmp_path / "validation.jsonl").write_text(shards[0])
    samples = set_up(text_model, tmp_path)._splits["train"]
    assert [(len(sample["input_ids"]), sample["label"]) for sample in samples] == [(1, 1), (2, 0)] * 3


def test_hub_classes_keep_their_names_whatever_other_files_hold() -> None:
    names = datasets.ClassLabel(names=["bad", "good"])
    train = datasets.Dataset.from_dict({"label": [1, -1, 0]}, features=datasets.Features({"label": names}))
    encoder = LabelEncoder(train, "label", drop_unlabelled=True)
    assert (encoder.names, encoder.encode(train, "train")) == (("bad", "good"), [1, None, 0])
    assert encoder.encode(column(["good", "bad"]), "validation") == [1, 0]
    with pytest.raises(DataError, match=r"label -1 in train \(row 1 of train"):
        LabelEncoder(train, "label").encode(train, "train")
    beyond = column([5]).cast_column("label", datasets.Value("int64"))
    with pytest.raises(DataError, match=r"label '5' of train \(row 0 of train, .*the classes are bad, good"):
        encoder.encode(beyond, "train")


def test_an_unlabelled_test_part_is_known_in_every_form() -> None:
    for values in (["neg", "pos"], [0, 1]):
        encoder = LabelEncoder(column(values), "label")
        for hidden in (["", ""], ["-1", "-1"], [-1, -1], [-1.0, None], [None, None]):
            assert encoder.is_unlabelled(column(hidden))
        assert not encoder.is_unlabelled(column([*map(str, values), ""]))


def test_rows_without_a_label_are_left_out_of_every_split(text_model: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"text": "w1 " * (1 + row), "label": ["a", "b", ""][row % 3]} for row in range(9)]
        pd.DataFrame(rows).to_csv(tmp_path / f"{split}.csv", index=False)
    with pytest.raises(DataError, match=rf"no label in train \(row 2 of {tmp_path}/train\.csv, column 'label'\)"):
        set_up(text_model, tmp_path)
    data = set_up(text_model, tmp_path, drop_unlabelled=True)
    assert data.class_names == ("a", "b")
    for samples in data._splits.values():
        assert [(len(sample["input_ids"]), sample["label"]) for sample in samples] == [
            (1, 0), (2, 1), (4, 0), (5, 1), (7, 0), (8, 1),
        ]  # fmt: skip


def test_a_label_map_that_no_row_needs_is_told_of(text_model: Path, tmp_path: Path, caplog) -> None:
    rows = [{"text": "w1", "label": ["neg", "pos", "1.0"][row % 3]} for row in range(9)]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame([*rows, {"text": "w1", "label": "bad"}]).to_csv(tmp_path / "test.csv", index=False)
    set_up(text_model, tmp_path, label_map={1: "pos", "bad": "neg"})
    assert "label_map names" not in caplog.text  # the folder of this test has label_map in its name
    set_up(text_model, tmp_path, label_map={1: "pos", "bad": "neg", "Neg": "neg", 4: "pos"})
    assert (
        f"label_map names 'Neg', '4', which no row of {tmp_path} has in column 'label'; its classes are neg, pos"
        in (caplog.text)
    )


def test_rows_are_named_before_validation_is_cut(text_model: Path, tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": "x" if row == 17 else str(row % 2)} for row in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "w1"}])))
    with pytest.raises(DataError, match=r"\(row 40 of .*a\.jsonl"):
        set_up(text_model, path)
    data = set_up(text_model, path, drop_unlabelled=True)
    assert data.class_names == ("0", "1", "x"), "a rare class is one, in whichever part its row lands"


@pytest.mark.parametrize("missing", ["text", "other"])
def test_a_missing_text_names_its_file_and_row(text_model: Path, tmp_path: Path, missing: str) -> None:
    for part in range(2):
        rows = [{"text": "w1", "other": "w2", "label": row % 2} for row in range(5)]
        if part == 1:
            rows[3][missing] = None
        (tmp_path / f"train-0000{part}-of-00002.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = rf"row 3 of .*train-00001-of-00002\.jsonl has no text in column '{missing}'"
    with pytest.raises(DataError, match=where):
        set_up(text_model, tmp_path, text_pair_column="other")


def test_texts_of_numbers_are_texts(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,label\n" + "".join(f"{row},2024-01-{row + 10},{row % 2}\n" for row in range(20)))
    assert set_up(text_model, path).sizes == {"train": 18, "validation": 2}


def test_the_only_column_of_words_is_the_text(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "id,date,phrase,ok,stars\n" + "".join(f"{row},2024-01-01,w1 w2,true,{row % 2}\n" for row in range(20))
    )
    data = set_up(text_model, path, label_column="stars")
    assert set(data._splits["train"].lengths) == {2}


def test_the_second_text_may_be_the_first(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "w1 w2,0\nw1 w2,1\n" * 5)
    assert set(set_up(text_model, path, text_pair_column="text")._splits["train"].lengths) == {4}


def test_a_column_that_another_part_lacks_is_named_with_the_part(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,other,label\nw1,w2,0\nw1,w2,1\n")
    for rest, settings, message in [
        ("other,label\nw2,0\n", {}, "text_column=text: no such column in validation of"),
        ("text,label\nw1,0\n", {"text_pair_column": "other"}, "text_pair_column=other: no such column in valid"),
        ("text,other\nw1,w2\n", {}, "label_column=label: no such column in validation of"),
    ]:
        (tmp_path / "validation.csv").write_text(rest)
        with pytest.raises(DataError, match=message):
            set_up(text_model, tmp_path, **settings)


def test_a_text_column_of_another_type_is_named(text_model: Path, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": [1, 2], "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"column 'text' \(text_column\) of train of .* holds values like \d+, not strings"
    ):
        set_up(text_model, tmp_path / "a.parquet")
    with pytest.raises(ConfigurationError, match=r"^label_map=x: must be a mapping"):
        TextClassificationDataModule("model", label_map="x")  # type: ignore[arg-type]
