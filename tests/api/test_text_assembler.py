"""Text that is assembled from tokens equals the tokenizer's, and ends at stop texts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from petals_lightning.api.text import TextAssembler
from petals_lightning.sample import MODEL_DIR


class Bytes:
    """A tokenizer whose tokens are bytes, so that most characters have several."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


def assemble(tokenizer, ids, *stop, strip=False):
    text = TextAssembler(tokenizer, stop, strip=strip)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    return [*pieces, text.finish()], text.is_stopped


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_pieces_are_the_tokenizers_text(tokenizer):
    ids = tokenizer("the plot was dull . what is your verdict ? <s> no !")["input_ids"]
    pieces, _ = assemble(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[1], "words come as they are complete"


@pytest.mark.slow
@given(st.text(max_size=20))
def test_no_character_comes_in_parts(text):
    pieces, _ = assemble(Bytes(), text.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=3), st.booleans())
def test_stop_texts_end_a_text_wherever_they_are_cut(text, stops, strip):
    pieces, is_stopped = assemble(Bytes(), text.encode(), *stops, strip=strip)
    ends = [length for length in range(len(text) + 1) if any(text[:length].endswith(stop) for stop in stops)]
    expected = text
    if ends:  # the first one that is complete, and of those the longest
        before = text[: ends[0]]
        expected = before[: min(before.find(stop) for stop in stops if stop in before)]
    assert is_stopped == bool(ends)
    assert "".join(pieces) == (expected.strip() if strip else expected)


def test_what_may_become_a_stop_text_is_held_back():
    text = TextAssembler(Bytes(), ("END",))
    assert [text.add(token) for token in b"xENxEN"] == ["x", "", "", "ENx", "", ""]
    assert text.finish() == "EN"
