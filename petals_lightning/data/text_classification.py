"""The DataModule for any labelled texts."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.base import Splits, TextDataModule
from petals_lightning.data.columns import LabelEncoder, find_label_column, find_text_column
from petals_lightning.data.tokenizers import EncodedTexts, PadRight
from petals_lightning.errors import ConfigurationError


class TextClassificationDataModule(TextDataModule):
    """Batches `{"input_ids": [B, S], "attention_mask": [B, S], "labels": [B]}` for classifying texts.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or labelled texts from elsewhere; see `TextDataModule`.
        text_column: None finds it by name.
        text_pair_column: the second text of a sample, for tasks on pairs.
        label_column: None finds it by name.
        num_labels: classes; None counts them in the training part.
        options: as of `TextDataModule`; texts of more than `max_length` tokens are cut off.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: there is no label column, or labels are outside `num_labels`.
    """

    num_labels: int
    """Number of classes; known after `setup`."""
    class_names: tuple[str, ...]
    """Their names; known after `setup`."""

    def __init__(
        self,
        tokenizer: str,
        source: str = "bundled",
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        num_labels: int | None = None,
        **options: Any,
    ):
        super().__init__(tokenizer, source, **options)
        if num_labels is not None and num_labels < 2:
            raise ConfigurationError(f"data.num_labels={num_labels}: must be at least 2, or null to count the classes")
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self.requested_num_labels = num_labels

    def encoded(self, raw: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, EncodedTexts]:
        text = find_text_column(raw["train"], self.text_column)
        label = find_label_column(raw["train"], self.label_column, where=self.source)
        raw = self.with_validation(raw)
        encoder = LabelEncoder(raw["train"], label, self.requested_num_labels)
        self.num_labels, self.class_names = len(encoder.names), encoder.names
        splits = {}
        for split, rows in raw.items():
            hidden = split == "test" and encoder.is_unlabelled(rows)
            if not hidden:
                find_label_column(rows, label, where=f"{split} of {self.source}")
            splits[split] = EncodedTexts(
                tokenizer,
                _column(rows, find_text_column(rows, text)),
                _column(rows, find_text_column(rows, self.text_pair_column)) if self.text_pair_column else None,
                None if hidden else encoder.encode(rows, split),
                self.max_length,
            )
        return splits

    def collate(self, pad_token_id: int) -> PadRight:
        return PadRight(pad_token_id)

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test part with labels."""
        return super().has_labelled_test and self._splits["test"].labels is not None

    @property
    def description(self) -> str:
        return f"{self.num_labels} classes"

    def predict_dataloader(self) -> DataLoader:
        """The test part, or else validation, in the order of the file."""
        samples = self._splits.get("test") or self._splits["validation"]
        return DataLoader(
            samples, batch_size=self.eval_batch_size, collate_fn=self._collate, generator=torch.Generator()
        )


def _column(rows: datasets.Dataset, name: str) -> list[str]:
    return rows[name][:]
