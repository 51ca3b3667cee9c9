"""Finds the column of texts and the column of labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets

from petals_lightning.errors import DataError

TEXT_COLUMNS = ("sentence", "text", "review", "content", "comment", "body", "message", "utterance", "title")
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "intent")

_LETTER = re.compile(r"[^\W\d_]")
_ROWS_LOOKED_AT = 1000
_WORDS_OF_A_NAME = 3  # a column name of more words is a text
_NAMES_LISTED = 20


def find_text_column(
    dataset: datasets.Dataset, named: str | None = None, *, setting: str = "text_column", where: str = "the data"
) -> str:
    """The column called `named`; or the first existing one of `TEXT_COLUMNS`, or the only column of words.

    `setting` (the name of the option for this column) and `where` (the data) appear in messages.

    Raises:
        DataError: there is no such column, or it holds other values than strings.
    """
    strings = [name for name in dataset.column_names if _is_string(dataset.features[name])]
    if named is not None:
        _require(dataset, named, f"{setting}", where)
    else:
        named = _first(TEXT_COLUMNS, strings) or _first(TEXT_COLUMNS, dataset.column_names)
    if named is None:
        head = dataset[:_ROWS_LOOKED_AT]
        wordy = [name for name in strings if _has_words(head[name])]
        if len(wordy) != 1:
            raise DataError(
                f"no text column in {where}: the columns are {_listing(dataset)}; name it with {setting}=… "
                f"(found automatically: {', '.join(TEXT_COLUMNS)})"
            )
        (named,) = wordy
    if named not in strings:
        value = next((value for value in dataset[:_ROWS_LOOKED_AT][named] if value is not None), None)
        raise DataError(f"column {named!r} ({setting}) of {where} holds values like {value!r:.80}, not strings")
    return named


def find_label_column(dataset: datasets.Dataset, named: str | None = None, *, where: str = "the data") -> str:
    """The column called `named`, or the first existing one of `LABEL_COLUMNS`.

    Raises:
        DataError: there is no such column; the message lists the columns.
    """
    if named is not None:
        _require(dataset, named, "label_column", where)
        return named
    found = _first(LABEL_COLUMNS, dataset.column_names)
    if found is None:
        raise DataError(
            f"no label column in {where}: the columns are {_listing(dataset)}; name it with label_column=… "
            f"(found automatically: {', '.join(LABEL_COLUMNS)})"
        )
    return found


def _require(dataset: datasets.Dataset, column: str, setting: str, where: str) -> None:
    if column not in dataset.column_names:
        raise DataError(f"{setting}={column}: no such column in {where}; there are {_listing(dataset)}")


def _first(wanted: Sequence[str], available: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(available)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _has_words(values: Sequence[str | None]) -> bool:
    """Whether strings are not only numbers, dates and truth values, which csv files hold as strings too."""
    return any(value and _LETTER.search(value) and value.lower() not in ("true", "false") for value in values)


def _listing(dataset: datasets.Dataset) -> str:
    names = [repr(name) for name in dataset.column_names]
    listed = ", ".join(names[:_NAMES_LISTED]) + (f", … ({len(names)} in all)" if len(names) > _NAMES_LISTED else "")
    if any(name.isdigit() or len(name.split()) > _WORDS_OF_A_NAME for name in dataset.column_names):
        listed += " (if that is the first row, the file has no header: add one, such as text,label)"
    return listed
