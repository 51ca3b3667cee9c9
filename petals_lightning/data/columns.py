"""Which column is the text and which the label, and what the labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from petals_lightning.errors import DataError

TEXT_COLUMNS = ("sentence", "text", "review", "content", "comment", "body", "message", "utterance", "title")
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment", "intent")


def find_text_column(dataset: datasets.Dataset, named: str | None = None) -> str:
    """The column called `named`; else the first of `TEXT_COLUMNS` there is; else the only column of strings.

    Raises:
        DataError: there is none, or it holds something other than strings.
    """
    strings = [name for name in dataset.column_names if _is_string(dataset.features[name])]
    if named is not None:
        _require(dataset, named, "data.text_column")
    else:
        named = _first(TEXT_COLUMNS, strings) or (strings[0] if len(strings) == 1 else None)
        if named is None:
            raise DataError(
                f"no text column among {_listing(dataset)}; name it with data.text_column=… "
                f"(found by itself: {', '.join(TEXT_COLUMNS)})"
            )
    if named not in strings:
        raise DataError(f"data.text_column={named} holds {dataset.features[named]}, not strings")
    return named


def find_label_column(dataset: datasets.Dataset, named: str | None = None, *, where: str = "the data") -> str:
    """The column called `named`, or else the first of `LABEL_COLUMNS` there is.

    Raises:
        DataError: there is none; the message lists the columns that there are.
    """
    if named is not None:
        _require(dataset, named, "data.label_column")
        return named
    found = _first(LABEL_COLUMNS, dataset.column_names)
    if found is None:
        raise DataError(
            f"no label column in {where}: the columns are {_listing(dataset)}; name it with data.label_column=… "
            f"(found by itself: {', '.join(LABEL_COLUMNS)})"
        )
    return found


class LabelEncoder:
    """Maps a column's values to classes 0 … num_labels-1.

    Class names of a hub dataset are kept; strings are numbered in sorted order of the training labels, so that the same
    data give the same classes on every machine; integers are taken as they are.

    Args:
        train: the rows that define the classes.
        column: their label column.
        num_labels: how many classes there are; None counts them.

    Raises:
        DataError: labels are missing, fractional, negative, or outside `num_labels`.
    """

    names: tuple[str, ...]
    """The name of each class, in order."""

    def __init__(self, train: datasets.Dataset, column: str, num_labels: int | None = None):
        self.column = column
        self._codes: dict[str, int] | None = None
        feature = train.features[column]
        values = train[column][:]
        if isinstance(feature, datasets.ClassLabel):
            self.names = tuple(feature.names)
        elif _is_string(feature):
            self.names = tuple(sorted({_present(value, column, "train") for value in values}))
            self._codes = {name: code for code, name in enumerate(self.names)}
        else:
            largest = max((_as_integer(value, column, "train") for value in values), default=1)
            self.names = tuple(str(code) for code in range(max(num_labels or largest + 1, 2)))
        if num_labels is not None:
            if len(self.names) > num_labels:
                raise DataError(
                    f"data.num_labels={num_labels}, but column {column!r} has {len(self.names)} classes "
                    f"({_shortened(self.names)}); set data.num_labels={len(self.names)} or null to count them"
                )
            self.names += tuple(str(code) for code in range(len(self.names), num_labels))
        if len(self.names) < 2:
            raise DataError(f"column {column!r} has one class only ({_shortened(self.names)}): nothing to learn")

    def encode(self, dataset: datasets.Dataset, split: str) -> list[int]:
        """The class of every row.

        Raises:
            DataError: a row's label is missing or no class; the message names the first such value.
        """
        values = dataset[self.column][:]
        if self._codes is not None:
            return [self._code(_present(value, self.column, split), split) for value in values]
        codes = [_as_integer(value, self.column, split) for value in values]
        for row, code in enumerate(codes):
            if not 0 <= code < len(self.names):
                fix = f"set data.num_labels={code + 1}" if code >= 0 else "remove such rows"
                raise DataError(
                    f"label {code} (row {row} of {split}, column {self.column!r}) is outside "
                    f"0…{len(self.names) - 1} (num_labels={len(self.names)}); {fix}, or relabel the data"
                )
        return codes

    def is_unlabelled(self, dataset: datasets.Dataset) -> bool:
        """Whether a split carries no labels: no such column, or -1 throughout, as GLUE hides its test labels."""
        return self.column not in dataset.column_names or set(dataset[self.column][:]) <= {-1, None}

    def _code(self, value: Any, split: str) -> int:
        assert self._codes is not None
        if str(value) not in self._codes:
            raise DataError(
                f"label {value!r} of {split} (column {self.column!r}) is in no training row; "
                f"the classes are {_shortened(self.names)}"
            )
        return self._codes[str(value)]


def _as_integer(value: Any, column: str, split: str) -> int:
    _present(value, column, split)
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise DataError(f"label {value!r} of {split} (column {column!r}) is neither a whole number nor a name")


def _present(value: Any, column: str, split: str) -> Any:
    if value is None:
        raise DataError(f"a row of {split} has no label in column {column!r}; remove it or label it")
    return value


def _require(dataset: datasets.Dataset, column: str, setting: str) -> None:
    if column not in dataset.column_names:
        raise DataError(f"{setting}={column}: no such column; there are {_listing(dataset)}")


def _first(wanted: Sequence[str], available: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(available)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _listing(dataset: datasets.Dataset) -> str:
    return ", ".join(repr(name) for name in dataset.column_names)


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
