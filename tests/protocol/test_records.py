"""Records survive the trip; whatever else peers store is refused with one kind of error."""

from __future__ import annotations

import ast
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.records import MAX_WORD_LENGTH, ServerRecord, ServerState

FULL = ServerRecord(
    ServerState.ONLINE, 12.5, 3, 9, public_name="ours", version="0.1", torch_dtype="bfloat16",
    tokens_per_second=900.0, stream_version=1, hidden_size=64, fingerprint="abc", adapters=("org/polite", "brief"),
)  # fmt: skip


@pytest.mark.parametrize("record", [FULL, ServerRecord(ServerState.OFFLINE, 0.0)])
def test_a_record_survives_the_round_trip(record):
    assert ServerRecord.from_value(record.to_value()) == record


def test_records_that_petals_stored_are_read(shared_data):
    calls = shared_data / "petals-wire" / "calls.json"
    if not calls.is_file():
        pytest.skip(f"needs the recorded Petals calls in {calls}")
    stored = json.loads(calls.read_text())["dht_values"]
    blocks = [text for uid, text in stored.items() if re.search(r"\.\d+$", uid)]
    assert blocks, "the test is blind: no block record was found"
    for text in blocks:
        found = re.search(r"\(value=(\(.*\)), expiration_time", text[30:])
        assert found is not None
        value = ast.literal_eval(found[1])
        record = ServerRecord.from_value(value)
        assert record.state is ServerState.ONLINE
        assert (record.start, record.end, record.torch_dtype, record.version) == (0, 5, "float32", "2.3.0.dev2")
        assert record.stream_version is None
        assert record.hidden_size is None


@pytest.mark.parametrize(
    "value",
    [
        None, 2, "21", b"\x02\x01", {2: 0, 1.0: 0}, (), (2,), (7, 1.0), (-1, 1.0), ("online", 1.0), ([], 1.0),
        (2, "fast"), (2, None), (2, math.nan), (2, math.inf), (2, -1.0), (2, 10**400),
    ],
    ids=repr,
)  # fmt: skip
def test_malformed_records_are_refused(value):
    with pytest.raises(ProtocolError, match="malformed server record"):
        ServerRecord.from_value(value)


@pytest.mark.parametrize("extra", [None, [], "x", 3, {"lightning": 4}, {1: 2}])
def test_a_record_without_usable_extras_keeps_its_essentials(extra):
    assert ServerRecord.from_value((2, 1, extra)) == ServerRecord(ServerState.ONLINE, 1.0)


def test_keys_of_a_wrong_type_are_dropped_alone():
    state, throughput, extra = FULL.to_value()
    extra |= {"public_name": 5, "version": None, "start_block": True, "unknown": object(), "forward_rps": math.nan}
    extra["lightning"] |= {"hidden_size": "64"}
    extra["adapters"] = ["two\nlines", 5, "", "fine", "x" * 1000]
    got = ServerRecord.from_value((state, throughput, extra))
    assert got == ServerRecord(
        ServerState.ONLINE, 12.5, torch_dtype="bfloat16", stream_version=1, fingerprint="abc", adapters=("fine",)
    )  # fmt: skip


@pytest.mark.parametrize("speed", [5e-324, 1e-9, 0, -1.0, math.inf, math.nan, True, 10**400])
def test_a_speed_by_which_nothing_can_be_divided_is_dropped(speed):
    state, throughput, extra = FULL.to_value()
    assert ServerRecord.from_value((state, throughput, extra | {"forward_rps": speed})).tokens_per_second is None


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b[31mred\x1b[0m\x07", "[31mred [0m"),
        ("two\r\nlines\x9b2J", "two lines 2J"),
        ("\u202egnp.exe", "gnp.exe"),
        ("n" * 10_000, "n" * MAX_WORD_LENGTH),
        ("\x1b\n ", None),
        ("Zoë's 漢", "Zoë's 漢"),
    ],
)
def test_names_cannot_control_a_terminal(said, shown):
    extra = dict.fromkeys(("public_name", "version", "torch_dtype"), said) | {
        "lightning": {"stream": 1, "fingerprint": said}
    }
    record = ServerRecord.from_value((2, 1.0, extra))
    assert [record.public_name, record.version, record.torch_dtype, record.fingerprint] == [shown] * 4


@pytest.mark.parametrize("span", [(5, 5), (5, 2), (-1, 2), (0, None)])
def test_impossible_spans_are_dropped(span):
    record = ServerRecord.from_value((2, 1.0, {"start_block": span[0], "end_block": span[1]}))
    assert (record.start, record.end) == (None, None)


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
_extras = st.dictionaries(
    st.sampled_from(
        ["start_block", "end_block", "public_name", "version", "torch_dtype", "forward_rps", "adapters", "lightning"]
    ),
    _values | st.dictionaries(st.sampled_from(["stream", "hidden_size", "fingerprint"]), _scalars),
)


@settings(deadline=None)
@given(_values | st.tuples(st.integers(0, 2), _scalars, _extras))
def test_no_value_raises_anything_but_a_protocol_error(value):
    try:
        record = ServerRecord.from_value(value)
    except ProtocolError:
        return
    assert ServerRecord.from_value(record.to_value()) == record
