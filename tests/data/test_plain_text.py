"""Plain texts as windows of tokens, every one of them a label."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch

from petals_lightning.data import PlainTextDataModule, load_tokenizer
from petals_lightning.data.collate import IGNORED
from petals_lightning.data.plain_text import chunk_tokens
from petals_lightning.errors import DataError


def set_up(model, source, **settings) -> PlainTextDataModule:
    data = PlainTextDataModule(str(model), str(source), **settings)
    data.setup()
    return data


def test_texts_are_one_stream_cut_into_windows(text_model):
    tokenizer = load_tokenizer(str(text_model))
    pieces = chunk_tokens(["w1 w2 w3", "", None, "w4 w5", "w6"], tokenizer, 4)
    assert [tokenizer.convert_ids_to_tokens(piece) for piece in pieces] == [
        ["w1", "w2", "w3", "</s>"], ["w4", "w5", "</s>", "w6"],
    ], "the last </s> stands alone and has nothing to predict"  # fmt: skip


def test_a_text_file_is_read_whole_and_its_end_is_validation(text_model, tmp_path):
    path = tmp_path / "book.txt"
    words = [f"w{number % 90}" for number in range(399)]
    path.write_text("\n".join(" ".join(words[at : at + 7]) for at in range(0, 399, 7)))
    data = set_up(text_model, path, max_length=20, batch_size=3)
    assert data.sizes == {"train": 18, "validation": 2}
    tokens = [*load_tokenizer(str(text_model))(" ".join(words))["input_ids"], 2]
    held_out = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    assert sorted(held_out.tolist()) == sorted([tokens[360:380], tokens[380:]])
    for batch in data.train_dataloader():
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_folder_of_texts_of_any_name_is_train(text_model, tmp_path, caplog):
    for name in ("b.txt", "a.txt", "c.txt.gz"):
        text = " ".join([f"w{ord(name[0]) - 90}"] * 11)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with caplog.at_level(logging.INFO):
        data = set_up(text_model, tmp_path, max_length=12, batch_size=3)
    assert f"{tmp_path}: no file is named after a split, so its 3 .txt files are train" in caplog.text
    tokens = load_tokenizer(str(text_model))(" ".join(f"w{ord(letter) - 90}" for letter in "abc"))["input_ids"]
    samples = [list(ids) for split in ("train", "validation") for ids, _ in data._splits[split]]
    assert samples == [[token] * 11 + [2] for token in tokens]
    (tmp_path / "validation.txt").write_text("w1 w2 w3")
    with pytest.raises(DataError, match=r"no train split in .*\(has a\.txt, b\.txt, c\.txt\.gz, validation\.txt\)"):
        set_up(text_model, tmp_path)


def test_files_by_split_and_any_text_column(text_model, tmp_path):
    for split, rows in {"train": 9, "validation": 3, "test": 2}.items():
        lines = [json.dumps({"id": row, "body": "w1 w2 w3 w4"}) for row in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = set_up(text_model, tmp_path, max_length=6, batch_size=4)
    assert data.sizes == {"train": 8, "validation": 3, "test": 2}
    (batch,) = data.test_dataloader()
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert torch.all(batch["labels"][batch["attention_mask"] == 0] == IGNORED)


def test_too_little_text_says_so(text_model, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("w1 w2")
    with pytest.raises(DataError, match=r"train of .*short\.txt has too few tokens .*max_length=50"):
        set_up(text_model, path, max_length=50)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"short\.txt: cannot be read as txt"):
        set_up(text_model, path)


def test_the_bundled_sample_is_text_too(text_model):
    assert set_up(text_model, "bundled").sizes.keys() == {"train", "validation", "test"}
