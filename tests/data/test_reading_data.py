"""Labelled texts are found and understood wherever they come from, or the error says what to change."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from petals_lightning.data import TextClassificationDataModule, load_tokenizer
from petals_lightning.data.labels import LabelEncoder
from petals_lightning.data.sources import load_splits, read_file
from petals_lightning.errors import CheckpointError, ConfigurationError, DataError

ROWS = [("fine ' film", 1), ('a "bad" one', 0), ("NA", 1), ("tab-free, comma", 0)]


def write(path: Path) -> Path:
    texts, labels = zip(*ROWS, strict=True)
    match path.suffix:
        case ".jsonl":
            lines = [json.dumps({"sentence": text, "label": label}) for text, label in ROWS]
        case ".tsv":
            lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in ROWS)]
        case ".csv":
            quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
            lines = ["sentence,label", *(f"{text},{label}" for text, label in zip(quoted, labels, strict=True))]
        case ".parquet":
            pa.parquet.write_table(pa.table({"sentence": texts, "label": labels}), path)
            return path
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def set_up(text_model: Path, source: Path | str, **settings: object) -> TextClassificationDataModule:
    data = TextClassificationDataModule(str(text_model), str(source), **settings)  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = read_file(write(tmp_path / f"some.{suffix}"))
    labels = LabelEncoder(rows, "label").encode(rows, "train")
    assert list(zip(rows["sentence"][:], labels, strict=True)) == ROWS


def test_splits_are_found_by_file_name(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.jsonl", "test.csv", "train_phrases.jsonl"):
        write(tmp_path / name)
    splits = load_splits(str(tmp_path))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "validation": 4, "test": 4}


def test_a_json_file_may_hold_each_split_as_a_list(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    rows = [{"text": text, "label": label} for text, label in ROWS]
    path.write_text(json.dumps({"version": 1, "train": rows, "dev": rows[:3]}))
    data = set_up(text_model, path)
    assert data.sizes == {"train": 4, "validation": 3}
    path.write_text(json.dumps({"one": rows, "two": [*rows, {"text": "w1", "label": [0]}]}))
    with pytest.raises(DataError, match=r"no train split in .*all\.json \(has one, two\); .*train_split"):
        set_up(text_model, path)
    with pytest.raises(DataError, match=r"label \[0\] \(row 4 of train of .*all\.json"):
        set_up(text_model, path, train_split="two")
    assert set_up(text_model, path, train_split="one", validation_split="one").sizes == {"train": 4, "validation": 4}


def test_numbered_shards_make_one_split(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"train-0000{number}-of-00002.parquet")
    assert len(load_splits(str(tmp_path))["train"]) == 8


def test_shards_with_a_fingerprint_in_their_names_make_one_split(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"train-0000{number}-of-00002-8f6c9b0a1e2d3c4{number}.parquet")
    assert len(load_splits(str(tmp_path))["train"]) == 8


@pytest.mark.parametrize("others", [["train.csv"], ["Train.tsv"], ["train-0-of-1.csv"]])
def test_a_split_that_is_there_twice_is_refused(tmp_path: Path, others: list[str]) -> None:
    for name in ("train.jsonl", *others):
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"train may be any of .*keep one"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("name", ["validation", "valid", "VAL", "dev", "eval", "evaluation"])
def test_validation_goes_by_many_names(tmp_path: Path, name: str) -> None:
    for file in ("train.jsonl", f"{name}.csv", "testing.tsv"):
        write(tmp_path / file)
    assert load_splits(str(tmp_path)).keys() == {"train", "validation", "test"}


def test_a_split_of_unusual_name_can_be_named(tmp_path: Path) -> None:
    for name in ("big.jsonl", "validation.jsonl"):
        write(tmp_path / name)
    for given in ("big", "big.jsonl"):
        assert len(load_splits(str(tmp_path), split_names={"train": given})["train"]) == 4
    with pytest.raises(DataError, match=r"test_split=hidden: not in .*big\.jsonl"):
        load_splits(str(tmp_path), split_names={"train": "big", "test": "hidden"})


def test_missing_validation_is_cut_from_train_by_seed(text_model: Path, texts: Path) -> None:
    def cut(seed: int) -> list[list[int]]:
        data = set_up(text_model, texts / "train.jsonl", validation_fraction=0.25, seed=seed)
        assert data.sizes == {"train": 30, "validation": 10}
        return data._splits["validation"].input_ids

    assert cut(0) == cut(0) != cut(1)


def test_other_columns_are_found_or_named(text_model: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "Review": f"w{i}", "verdict": "good" if i % 2 else "bad"} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = set_up(text_model, path, label_column="verdict")
    assert data.class_names == ("bad", "good")


def test_a_second_text_is_appended(text_model: Path, tmp_path: Path) -> None:
    rows = [{"sentence": "w1 w2", "other": "w3", "label": i % 2} for i in range(20)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert set(set_up(text_model, path, text_pair_column="other")._splits["train"].lengths) == {3}


def test_no_label_column_lists_the_columns_there_are(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"sentence": "w1", "stars": 3}\n')
    with pytest.raises(DataError, match=r"no label column in .*'sentence', 'stars'.*with label_column=…"):
        set_up(text_model, path)


def test_a_table_without_a_header_is_suspected(text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a film that is worth it,1\na waste of an evening,0\n")
    with pytest.raises(DataError, match=r"no label column in .*'1' \(if that is the first row, the file has no header"):
        set_up(text_model, tmp_path / "a.csv")


def test_a_misnamed_column_lists_the_columns_there_are(text_model: Path, texts: Path) -> None:
    with pytest.raises(
        DataError, match=r"label_column=lable: no such column in train of .*; there are 'sentence', 'label'"
    ):
        set_up(text_model, texts, label_column="lable")


def test_labels_outside_num_labels_name_the_value_and_the_fix() -> None:
    train = datasets.Dataset.from_dict({"label": [0, 1, 2]})
    with pytest.raises(DataError, match=r"label 2 .* is outside 0…1 \(num_labels=2\); set num_labels=3"):
        LabelEncoder(train, "label", num_labels=2).encode(train, "train")


def test_names_beyond_num_labels_name_the_fix() -> None:
    train = datasets.Dataset.from_dict({"label": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"has 3 classes \(a, b, c\); set num_labels=3"):
        LabelEncoder(train, "label", num_labels=2)


@pytest.mark.parametrize(
    ("values", "names", "codes"),
    [
        (["spam", "ham", "eggs"], ("eggs", "ham", "spam"), [2, 1, 0]),
        ([0, 2, 1], ("0", "1", "2"), [0, 2, 1]),
        ([True, False], ("0", "1"), [1, 0]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
    ],
)
def test_labels_of_any_kind_become_classes(values: list, names: tuple[str, ...], codes: list[int]) -> None:
    rows = datasets.Dataset.from_dict({"label": values})
    encoder = LabelEncoder(rows, "label")
    assert encoder.names == names
    assert encoder.encode(rows, "train") == codes


def test_names_of_a_hub_dataset_are_kept() -> None:
    labels = datasets.ClassLabel(names=["negative", "positive"])
    rows = datasets.Dataset.from_dict({"label": [1, 0]}, features=datasets.Features({"label": labels}))
    encoder = LabelEncoder(rows, "label")
    assert encoder.names == ("negative", "positive")
    assert encoder.encode(rows, "train") == [1, 0]


@pytest.mark.parametrize("value", [None, -1, 0.5])
def test_unusable_labels_are_refused(value: object) -> None:
    rows = datasets.Dataset.from_dict({"label": [0, 1, value]})
    with pytest.raises(DataError, match="label"):
        LabelEncoder(rows, "label").encode(rows, "train")


def test_a_name_that_training_lacks_is_refused() -> None:
    encoder = LabelEncoder(datasets.Dataset.from_dict({"label": ["a", "b"]}), "label")
    with pytest.raises(DataError, match=r"'c' of validation .* the classes are a, b"):
        encoder.encode(datasets.Dataset.from_dict({"label": ["c"]}), "validation")


def test_hidden_test_labels_fall_back_to_validation(text_model: Path, texts: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_bytes((texts / f"{split}.jsonl").read_bytes())
    (tmp_path / "test.jsonl").write_text('{"sentence": "w1 w2", "label": -1}\n' * 5)
    data = set_up(text_model, tmp_path)
    assert not data.has_labelled_test
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 16
    assert [batch["input_ids"].shape for batch in data.predict_dataloader()] == [(5, 2)]


@pytest.mark.parametrize("source", ["./nowhere", "missing.jsonl", "/no/such/folder"])
def test_a_missing_source_says_so(text_model: Path, source: str) -> None:
    with pytest.raises(DataError, match=f"^source={source}: no such file or folder"):
        set_up(text_model, source)


def test_a_clone_whose_readme_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: [\n---\n")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    with pytest.raises(DataError, match=r"cannot be read as the clone of a hub dataset \(while parsing") as raised:
        load_splits(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_arrow_files_are_read_without_what_save_to_disk_wrote_beside_them(tmp_path: Path) -> None:
    rows = read_file(write(tmp_path / "a.jsonl"))
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").unlink()
    splits = load_splits(str(tmp_path / "saved"))
    assert splits["train"].to_list() == splits["test"].to_list() == rows.to_list()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{no json")
    with pytest.raises(DataError, match=r"train\.jsonl: cannot be read as jsonl"):
        read_file(path)


@pytest.mark.parametrize(
    "setting",
    [{"batch_size": 0}, {"max_length": 0}, {"validation_fraction": 1.0}, {"num_labels": 1}, {"eval_batch_size": -1}],
)
def test_settings_out_of_range_are_named(setting: dict) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{next(iter(setting))}="):
        TextClassificationDataModule("model", **setting)


def test_a_tokenizer_without_padding_pads_with_eos(text_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(text_model))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer=.*: no tokenizer there"):
        load_tokenizer(str(tmp_path))
