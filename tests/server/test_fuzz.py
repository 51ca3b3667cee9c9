"""A quick seeded run of the fuzzer; `python -m tests.server.fuzz --inputs 100000` is the long one."""

from __future__ import annotations

import logging

import pytest

from tests.server.fuzz import run


@pytest.mark.slow
def test_mutated_requests_and_garbage_harm_nobody(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    report = run(tmp_path, inputs=4000, seed=7)
    assert report.inputs == 4000
    assert report.replies["ok"] > 100, "the fuzzer is blind: hardly anything gets through"
    assert report.replies["bad_request"] > 300
    assert report.served > 50
    assert report.longest_wait < 5
    assert report.rss_growth < 64 << 20
