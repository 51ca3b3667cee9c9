"""A quick seeded run of the fuzzer; `python -m tests.petals.fuzz --inputs 100000` is the long one."""

from __future__ import annotations

import logging

import pytest

from tests.petals.fuzz import run


@pytest.mark.slow
def test_mutated_calls_and_garbage_harm_nobody(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    report = run(tmp_path, inputs=1500, seed=7)
    assert report.inputs >= 1500
    assert report.replies["ok"] > 150, "the fuzzer is blind: hardly anything gets through"
    assert report.replies["bad_request"] > 250
    assert report.served > 50
    assert report.longest_wait < 5
    assert report.rss_growth < 64 << 20
