"""The runs in docs/quality.json, and what docs/tuning.md says of them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.quality import Case
from benchmarks.quality_report import Row, draw_rows, print_rows

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    found: list[Row] = json.loads((DOCS / "quality.json").read_text(encoding="utf-8"))
    return found


def test_each_run_names_all_that_a_case_has_and_none_is_there_twice(rows):
    names = [field.name for field in fields(Case)]
    assert all(set(names) <= row.keys() for row in rows)
    cases = [tuple(row[name] for name in names) for row in rows]
    assert len(set(cases)) == len(cases)


def test_tables_have_the_means_that_the_page_has(rows, capsys):
    print_rows(rows)
    printed, page = capsys.readouterr().out, (DOCS / "tuning.md").read_text(encoding="utf-8")
    assert "sst2, SmolLM2-135M-Instruct: 108 steps of 16, all labels, bfloat16" in printed
    assert "48 steps of 16, 64 labels of each class, bfloat16" in printed
    assert "servers: 1, weights: nf4" in printed
    on_page = re.findall(r"0\.\d{3} \(0\.\d{3}–0\.\d{3}\)", page)
    for means in ("0.810 (0.808–0.812)", "0.847 (0.828–0.860)", "0.779 (0.727–0.839)", "0.823 (0.790–0.857)"):
        assert means in on_page
    for means in on_page:
        assert means in printed


def test_a_picture_is_drawn_also_of_few_runs(rows, tmp_path):
    for name, some in {"all": rows, "one": rows[:1], "none": []}.items():
        draw_rows(some, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
