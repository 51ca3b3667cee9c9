"""DataModules for texts with a number each, or with any number of classes each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets

from petals_lightning.data.sources import BUNDLED
from petals_lightning.data.text_classification import TextClassificationDataModule
from petals_lightning.errors import ConfigurationError, DataError


class NumberEncoder:
    """Reads numbers. Has the interface of `LabelEncoder`: the only "class" is the column.

    Args:
        column: of the numbers.
        drop_unlabelled: whether rows without a value are allowed; they are left out.
        where: describes a row of a split for messages.
    """

    never_mapped: tuple[str, ...] = ()

    def __init__(self, column: str, *, drop_unlabelled: bool, where: Callable[[str, int], str]):
        self.column, self.names = column, (column,)
        self._drop_unlabelled, self._where = drop_unlabelled, where

    def encode(self, dataset: datasets.Dataset, split: str) -> list[float | None]:
        """The number of every row; None for rows without a value, if allowed.

        Raises:
            DataError: a row has a value that is no number, or none; the message names the first such row.
        """
        numbers = []
        for row, value in enumerate(dataset[self.column][:]):
            number, is_missing = _number(value), _is_missing(value)
            if number is None and not (is_missing and self._drop_unlabelled):
                mend = "leave such rows out with drop_unlabelled=True" if is_missing else "correct it, or make it empty"
                raise DataError(
                    f"{value!r:.60} ({self._where(split, row)}, column {self.column!r}) is not a number: {mend}"
                )
            numbers.append(number)
        return numbers

    def is_unlabelled(self, dataset: datasets.Dataset) -> bool:
        """Whether a split has no numbers."""
        return self.column not in dataset.column_names or all(map(_is_missing, dataset[self.column][:]))


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # the last is not-a-number, as pandas writes what is missing


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


class LabelSetEncoder:
    """Reads sets of classes as vectors of 0 and 1. Has the interface of `LabelEncoder`.

    Args:
        train: the rows that define the classes, in sorted order of their names, or of numbers.
        column: whose values are lists of classes; a single value is a set of one.
        where: describes a row of a split for messages.

    Raises:
        DataError: there are fewer than two classes.
    """

    never_mapped: tuple[str, ...] = ()

    def __init__(self, train: datasets.Dataset, column: str, *, where: Callable[[str, int], str]):
        self.column, self._where = column, where
        feature = train.features[column]
        named: Any = getattr(feature, "feature", feature)  # of a list's items
        self._class_label = named if isinstance(named, datasets.ClassLabel) else None
        found = {label for value in train[column][:] for label in self._labels(value)}
        if self._class_label is not None:
            found |= set(self._class_label.names)
        are_numbers = all(label.lstrip("-").isdigit() for label in found)
        self.names = tuple(sorted(found, key=int) if are_numbers else sorted(found))
        if len(self.names) < 2:
            raise DataError(f"column {column!r} has the classes {', '.join(self.names) or 'none'}: nothing to learn")
        self._codes = {name: code for code, name in enumerate(self.names)}

    def encode(self, dataset: datasets.Dataset, split: str) -> list[list[float]]:
        """A vector of 0 and 1 for every row. Raises DataError for a class that train does not have."""
        vectors = []
        for row, value in enumerate(dataset[self.column][:]):
            vector = [0.0] * len(self.names)
            for label in self._labels(value):
                if label not in self._codes:
                    raise DataError(
                        f"class {label!r} of {split} ({self._where(split, row)}, column {self.column!r}) is not one of "
                        f"train's: {', '.join(self.names[:20])}"
                    )
                vector[self._codes[label]] = 1.0
            vectors.append(vector)
        return vectors

    def is_unlabelled(self, dataset: datasets.Dataset) -> bool:
        """Whether a split has no column of classes, or no class in any row."""
        return self.column not in dataset.column_names or not any(map(self._labels, dataset[self.column][:]))

    def _labels(self, value: Any) -> list[str]:
        values = value if isinstance(value, (list, tuple)) else [value]
        names = self._class_label.names if self._class_label is not None else ()
        return [names[each] if names else str(each).strip() for each in values if each not in (None, "")]


class TextNumberDataModule(TextClassificationDataModule):
    """Batches `{"input_ids": [B, S], "attention_mask": [B, S], "labels": [B]}` of texts with a number each.

    Args:
        tokenizer, source, options: as for `TextClassificationDataModule`, without `num_labels` and `label_map`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: a row has no text, or no number.
    """

    def __init__(self, tokenizer: str, source: str = BUNDLED, **options: Any):
        super().__init__(tokenizer, source, **options)
        for name, value in (("num_labels", self.requested_num_labels), ("label_map", self.label_map)):
            if value is not None:
                raise ConfigurationError(f"{name}={value}: it is for one class per text; leave it off")

    def _encoder(self, train: datasets.Dataset, column: str, where: Callable[[str, int], str]) -> Any:
        return NumberEncoder(column, drop_unlabelled=self.drop_unlabelled, where=where)

    @property
    def description(self) -> str:
        return "texts with a number each"


class TextLabelSetDataModule(TextNumberDataModule):
    """Batches `{"input_ids": [B, S], "attention_mask": [B, S], "labels": [B, C]}` of texts with any number of classes.

    Args:
        tokenizer, source, options: as for `TextNumberDataModule`, without `drop_unlabelled`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: a row has no text, or a class that train does not have.
    """

    def __init__(self, tokenizer: str, source: str = BUNDLED, **options: Any):
        super().__init__(tokenizer, source, **options)
        if self.drop_unlabelled:
            raise ConfigurationError("drop_unlabelled=True: a text of no class is a sample here, too; leave it off")

    def _encoder(self, train: datasets.Dataset, column: str, where: Callable[[str, int], str]) -> Any:
        return LabelSetEncoder(train, column, where=where)

    @property
    def description(self) -> str:
        return f"texts, each with any of {self.num_labels} classes"
