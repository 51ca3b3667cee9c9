"""Benchmarks run, on a scale that says nothing about speed."""

from __future__ import annotations

import json

import pytest
import typer

from benchmarks import clients, mechanisms, routing, sst2_epoch

TINY = {"hidden": 64, "blocks": 1, "threads": 1}


@pytest.fixture
def rows(tmp_path):
    """Calls a benchmark and gives what it saved."""

    def run(main, **options):
        main(output=tmp_path / "rows.json", **options)
        return json.loads((tmp_path / "rows.json").read_text())

    return run


@pytest.fixture
def sentences(tmp_path):
    """A folder with a few sentences of 1 to 30 words, as SST-2 is stored."""
    lines = [{"sentence": "a moving film " * (1 + n % 10), "label": n % 2} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_routing(rows):
    assert [len(row) for row in rows(routing.main, servers=50, blocks=8, repeats=1)] == [3, 3, 3]


def test_clients(rows):
    found = rows(clients.main, counts="1,2", case="2x8x2", seconds=1.0, repeats=1, **TINY)
    assert len(found) == 4
    assert all(rate > 0 for _, rate, _ in found)


def test_sst2_epoch_moves_fewer_bytes_than_without_its_savings(rows, sentences):
    (row,) = rows(
        sst2_epoch.main, data=sentences, files="train.jsonl", limit=24, batch_size=4, pre_seq_len=2, **TINY
    )  # fmt: skip
    assert row["samples"] == 24
    assert row["ours_bytes"] < row["off_bytes"]


def test_sst2_epoch_says_what_is_missing(rows, tmp_path):
    with pytest.raises(typer.BadParameter, match=r"train\.jsonl is not there: give the folder of SST-2 with --data"):
        rows(sst2_epoch.main, data=tmp_path, files="train.jsonl", limit=1, batch_size=1, pre_seq_len=1, **TINY)


def test_a_mechanism_is_switched_off(rows, tmp_path):
    (time, size) = rows(
        mechanisms.main, cases="4x8x2", data=tmp_path / "none", only="rows only", repeats=1, **TINY
    )  # fmt: skip
    assert time[0] == "4x8x2, rows only, ms"
    assert size[1] > size[2]  # all positions weigh more
