"""The DataModule for any labelled texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.base import TextDataModule
from petals_lightning.data.collate import EncodedTexts, PadRight
from petals_lightning.data.columns import find_label_column, find_text_column
from petals_lightning.data.labels import LabelEncoder
from petals_lightning.data.sources import BUNDLED, LocatedSplits
from petals_lightning.data.template import TextTemplate
from petals_lightning.errors import ConfigurationError, DataError

log = logging.getLogger(__name__)

_CLASS = "class code"


class TextClassificationDataModule(TextDataModule):
    """Batches `{"input_ids": [B, S], "attention_mask": [B, S], "labels": [B]}` for classifying texts.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or labelled texts from elsewhere; see `TextDataModule`.
        text_column: None finds it by name.
        template: words around each text, e.g. `{text} It was`, for a model that names the class after them. If both are
            too long, the text is cut.
        text_pair_column: the second text of a sample, for tasks on pairs.
        label_column: None finds it by name.
        num_labels: classes; None counts them in the training part.
        label_map: labels to replace, e.g. `{-1: 0}` or `{"Pos": "pos"}`; None means no label.
        drop_unlabelled: leave out rows whose label is empty or -1, instead of refusing them.
        options: as for `TextDataModule`; texts are cut off after `max_length` tokens.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: there is no label column, or a row has no text, or no label within `num_labels`.
    """

    real_data = "data=sst2"
    num_labels: int
    """Number of classes; known after `setup`."""
    class_names: tuple[str, ...]
    """Their names; known after `setup`."""

    def __init__(
        self,
        tokenizer: str,
        source: str = BUNDLED,
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        template: str | None = None,
        label_column: str | None = None,
        num_labels: int | None = None,
        label_map: Mapping[Any, Any] | None = None,
        drop_unlabelled: bool = False,
        **options: Any,
    ):
        super().__init__(tokenizer, source, **options)
        if num_labels is not None and num_labels < 2:
            raise ConfigurationError(f"num_labels={num_labels}: must be at least 2, or None to count the classes")
        if label_map is not None and not isinstance(label_map, Mapping):
            raise ConfigurationError(f"label_map={label_map}: must be a mapping of labels, e.g. label_map={{-1: 0}}")
        if template is not None and text_pair_column is not None:
            raise ConfigurationError(
                f"text_pair_column={text_pair_column}: a template takes one text of each sample; join the two in one "
                "column, or leave template off"
            )
        self.template = template
        self._template = TextTemplate(template) if template is not None else None
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self.requested_num_labels = num_labels
        self.label_map, self.drop_unlabelled = label_map, drop_unlabelled

    def encoded(self, raw: LocatedSplits, tokenizer: PreTrainedTokenizerBase) -> dict[str, EncodedTexts]:
        train, where = raw["train"], f"train of {self.source}"
        texts = {"text_column": find_text_column(train, self.text_column, where=where)}
        if self.text_pair_column is not None:
            texts["text_pair_column"] = self.text_pair_column
        label = find_label_column(train, self.label_column, where=where)
        encoder = self._encoder(train, label, raw.where)
        self.num_labels, self.class_names = len(encoder.names), encoder.names
        hidden = {split for split, rows in raw.items() if split == "test" and encoder.is_unlabelled(rows)}
        checked = {split: self._checked(raw, split, texts, None if split in hidden else encoder) for split in raw}
        if encoder.never_mapped:
            log.warning(
                "label_map names %s, which no row of %s has in column %r; its classes are %s",
                ", ".join(map(repr, encoder.never_mapped)), self.source, label, ", ".join(encoder.names),
            )  # fmt: skip
        return {
            split: EncodedTexts(
                tokenizer,
                rows["text_column"][:],
                rows["text_pair_column"][:] if "text_pair_column" in texts else None,
                None if split in hidden else rows[_CLASS][:],
                self.max_length,
                self._template,
            )
            for split, rows in self.with_validation(checked).items()
        }

    def _encoder(self, train: datasets.Dataset, column: str, where: Callable[[str, int], str]) -> Any:
        """A `LabelEncoder`, or another one with its interface, for the labels in a column."""
        return LabelEncoder(
            train, column, self.requested_num_labels,
            label_map=self.label_map, drop_unlabelled=self.drop_unlabelled, where=where,
        )  # fmt: skip

    def _checked(
        self, raw: LocatedSplits, split: str, texts: dict[str, str], encoder: LabelEncoder | None
    ) -> datasets.Dataset:
        """The rows of a split: texts under the names of the settings, and classes if the split is labelled."""
        rows, where = raw[split], f"{split} of {self.source}"
        for setting, column in texts.items():
            find_text_column(rows, column, setting=setting, where=where)
        codes: list[int | None] = [0] * len(rows)
        if encoder is not None:
            find_label_column(rows, encoder.column, where=where)
            codes = encoder.encode(rows, split)
        labelled = [row for row, code in enumerate(codes) if code is not None]
        if not labelled:
            raise DataError(f"{where} has no labelled rows")
        if len(labelled) < len(rows):
            log.info("%s: %d rows without a label are left out", where, len(rows) - len(labelled))
        kept: dict[str, list[Any]] = {_CLASS: [codes[row] for row in labelled]}
        for setting, column in texts.items():
            values = rows[column][:]
            kept[setting] = [values[row] for row in labelled]
            if None in kept[setting]:
                row = labelled[kept[setting].index(None)]
                raise DataError(f"{raw.where(split, row)} has no text in column {column!r}; remove it or fill it")
        return datasets.Dataset.from_dict(kept)

    def collate(self, pad_token_id: int) -> PadRight:
        return PadRight(pad_token_id)

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test part with labels."""
        return super().has_labelled_test and self._splits["test"].labels is not None

    @property
    def description(self) -> str:
        return f"{self.num_labels} classes"

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part, or else the validation part, in the order of the file."""
        samples = self._splits.get("test") or self._splits["validation"]
        return DataLoader(
            samples, batch_size=self.eval_batch_size, collate_fn=self._collate, generator=torch.Generator()
        )
