"""Maps the values of a label column to classes 0 … num_labels-1."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import datasets

from petals_lightning.errors import DataError

_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?", re.ASCII)
_NO_NUMBER = {"na", "n/a", "nan", "null", "none"}
"""Texts that mark a missing number in files. Among names, they are names."""
_TRUTH = {"false": "0", "true": "1"}
_MISSING, _HIDDEN = "", "-1"


class LabelEncoder:
    """Maps a column's values to classes 0 … num_labels-1.

    Class names of a hub dataset are kept. Whole numbers are used as they are, even if a file has them as strings.
    False and true are 0 and 1, unless there are other names. Other strings are numbered in sorted order of the training
    labels, so that equal data give equal classes on every machine; blanks around them are ignored. Rows with an empty
    label, or with -1 as in GLUE's test parts, have no class.

    Args:
        train: the rows that define the classes.
        column: their label column.
        num_labels: number of classes; None counts them.
        label_map: labels to replace, e.g. `{-1: 0}` or `{"Pos": "pos"}`; None means no label.
        drop_unlabelled: whether rows without a class are allowed; they are left out.
        where: describes a row of a split for messages.

    Raises:
        DataError: labels are missing, fractional or negative, names differ in case only, or exceed `num_labels`.
    """

    names: tuple[str, ...]
    """The name of each class, in order."""

    def __init__(
        self,
        train: datasets.Dataset,
        column: str,
        num_labels: int | None = None,
        *,
        label_map: Mapping[Any, Any] | None = None,
        drop_unlabelled: bool = False,
        where: Callable[[str, int], str] = "row {1} of {0}".format,
    ):
        self.column, self.drop_unlabelled, self.where = column, drop_unlabelled, where
        self._map = {_written(old): _written(new) for old, new in (label_map or {}).items()}
        self._mapped: set[str] = set()
        texts = self._texts(train, "train")
        rows = _first_rows(texts)
        feature = train.features[column]
        named = isinstance(feature, datasets.ClassLabel)
        self._are_numbers = not named
        labels: dict[str, int] = {}
        for text, row in rows.items():
            labels.setdefault(self._label(text), row)
        present = {label: row for label, row in labels.items() if label not in (_MISSING, _HIDDEN)}
        numbers = [label for label in present if _NUMBER.fullmatch(label)]
        self._are_numbers = not named and all(
            label in numbers or (numbers and label.lower() in _NO_NUMBER) for label in present
        )
        if named:
            self.names = tuple(dict.fromkeys(map(self._label, feature.names)))
        elif self._are_numbers:
            if numbers == ["1"] and _HIDDEN in labels:
                raise DataError(
                    f"the labels of column {column!r} are -1 and 1, but classes count from 0: set label_map={{-1: 0}}"
                )
            self.names = self._numbered({label: present[label] for label in numbers}, num_labels)
        else:
            self._check_spelling(rows, Counter(texts))
            self.names = tuple(sorted({self._label(text) for text in rows} - {_MISSING, _HIDDEN}))
        if num_labels is not None:
            if len(self.names) > num_labels:
                raise DataError(
                    f"num_labels={num_labels}, but column {column!r} has {len(self.names)} classes "
                    f"({_shortened(self.names)}); set num_labels={len(self.names)} or None to count them"
                )
            self.names += tuple(str(code) for code in range(len(self.names), num_labels))
        if len(self.names) < 2:
            raise DataError(f"column {column!r} has one class only ({_shortened(self.names)}): nothing to learn")
        self._codes = {name: code for code, name in enumerate(self.names)}

    def encode(self, dataset: datasets.Dataset, split: str) -> list[int | None]:
        """The class of every row; None for rows without one, if allowed.

        Raises:
            DataError: a row's label is missing or not a class; the message names the first such row.
        """
        texts = self._texts(dataset, split)
        codes = {text: self._code(text, split, row) for text, row in _first_rows(texts).items()}
        return [codes[text] for text in texts]

    @property
    def never_mapped(self) -> list[str]:
        """Labels in `label_map` that no row so far has."""
        return [label for label in self._map if label not in self._mapped]

    def is_unlabelled(self, dataset: datasets.Dataset) -> bool:
        """Whether a split has no labels: no such column, or no class in any row."""
        if self.column not in dataset.column_names:
            return True
        labels = {self._label(text) for text in set(self._texts(dataset, "it"))}
        return all(label not in self._codes and self._is_no_label(label) for label in labels)

    def _texts(self, dataset: datasets.Dataset, split: str) -> list[str]:
        """Every row's value as a string; empty if there is none."""
        feature = dataset.features[self.column]
        names = dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else {}
        texts = []
        for row, value in enumerate(dataset[self.column][:]):
            try:
                texts.append(_written(names.get(value, value) if names else value))
            except TypeError:
                raise DataError(
                    f"label {value!r:.60} ({self.where(split, row)}, column {self.column!r}) is neither a whole number "
                    "nor a name"
                ) from None
        return texts

    def _label(self, text: str) -> str:
        """The label of a value: numbers in one form, names without surrounding blanks, then mapped by `label_map`."""
        stripped = text.strip()
        plain = str(int(float(stripped))) if _WHOLE.fullmatch(stripped) else stripped
        number = _TRUTH.get(plain.lower(), plain)
        usual = number if self._are_numbers else plain
        found = next((form for form in (text, stripped, plain, number) if form in self._map), None)
        if found is None:
            return usual
        self._mapped.add(found)
        return self._map[found]

    def _is_no_label(self, label: str) -> bool:
        return label in (_MISSING, _HIDDEN) or (self._are_numbers and label.lower() in _NO_NUMBER)

    def _numbered(self, rows: dict[str, int], num_labels: int | None) -> tuple[str, ...]:
        for label, row in rows.items():
            if not _WHOLE.fullmatch(label):
                raise DataError(
                    f"label {label} ({self.where('train', row)}, column {self.column!r}) is neither a whole number nor "
                    "a name; name classes with label_map"
                )
        largest = max(map(int, rows), default=1)
        if num_labels is None and 0 < 2 * len(rows) <= largest:  # years, ids, ratings of 0 and 4
            raise DataError(
                f"label {largest} ({self.where('train', rows[str(largest)])}, column {self.column!r}) would make "
                f"{largest + 1} classes, but {len(rows)} occur: set num_labels={largest + 1} if that is right, "
                "or number them with label_map, or name another column with label_column"
            )
        return tuple(str(code) for code in range(max(num_labels or largest + 1, 2)))

    def _check_spelling(self, rows: dict[str, int], counts: Counter[str]) -> None:
        seen: dict[str, str] = {}
        for text, row in rows.items():
            if text in self._map or text.strip() in self._map:
                continue
            other = seen.setdefault(_key(text), text)
            if other != text:
                rare, usual = (name.strip() for name in sorted((text, other), key=counts.__getitem__))
                raise DataError(
                    f"labels {text!r} ({self.where('train', row)}) and {other!r} ({self.where('train', rows[other])}) "
                    f"of column {self.column!r} differ in case or blanks only: to read them as one set "
                    f"label_map={{{rare!r}: {usual!r}}}"
                    + (f", to keep both label_map={{{rare!r}: {rare!r}}}" if rare != usual else "")
                )

    def _code(self, text: str, split: str, row: int) -> int | None:
        label, where = self._label(text), f"{self.where(split, row)}, column {self.column!r}"
        if label in self._codes:
            return self._codes[label]
        if self._is_no_label(label):
            if self.drop_unlabelled:
                return None
            fault = "label -1" if label == _HIDDEN else "no label"
            fix = ", or name its class with label_map" if label == _HIDDEN else ""
            raise DataError(f"{fault} in {split} ({where}): leave such rows out with drop_unlabelled=True{fix}")
        if self._are_numbers and _WHOLE.fullmatch(label):
            fix = f"set num_labels={int(label) + 1}" if int(label) >= 0 else "map it with label_map"
            raise DataError(
                f"label {label} ({where}) is outside 0…{len(self.names) - 1} (num_labels={len(self.names)}); "
                f"{fix}, or relabel the data"
            )
        raise DataError(
            f"label {text!r} of {split} ({where}) is not one of train's: the classes are {_shortened(self.names)}; "
            "label_map can replace labels"
        )


def _written(value: Any) -> str:
    """A value as a string, whole numbers without a decimal point; empty if there is none."""
    match value:
        case str():
            return value
        case None:
            return _MISSING
        case float() if math.isnan(value):
            return _MISSING
        case bool():
            return str(value)
        case int() | float() | Decimal():
            return str(int(value)) if value == value // 1 else str(value)
    raise TypeError


def _first_rows(texts: Sequence[str]) -> dict[str, int]:
    """Each value's first row, in the order of rows."""
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, row)
    return rows


def _key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _shortened(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
