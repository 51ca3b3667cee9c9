"""Samples of token ids in memory, and the collators that make batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.template import TextTemplate
from petals_lightning.errors import DataError

IGNORED = -100  # the label that losses ignore


class EncodedTexts(torch.utils.data.Dataset[Any]):
    """Token ids and labels in memory: a few bytes per token, so no cache files and no worker processes.

    Args:
        tokenizer: see `load_tokenizer`.
        texts: one string per sample.
        pairs: the second text of each sample (premise and hypothesis, …), or None.
        labels: of each sample its class, its number, or a vector of 0 and 1; or None for unlabelled data.
        max_length: maximum tokens per sample; the rest is cut off.
        template: words around each text, or None; not with `pairs`.

    Raises:
        DataError: a text is missing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: list[Any] | None,
        max_length: int,
        template: TextTemplate | None = None,
    ):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"row {row} has {text!r} instead of a text")
        limit = min(max_length, tokenizer.model_max_length)
        if template is not None:
            encoded = template.encode(tokenizer, texts, limit)
        else:
            second = list(pairs) if pairs else None
            encoded = tokenizer(list(texts), second, truncation=True, max_length=limit, padding=False)["input_ids"]
        # A sample needs a position to classify, even if its text is empty.
        filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        self.input_ids: list[list[int]] = [ids or [filler] for ids in encoded]
        self.labels = labels

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample."""
        return [len(ids) for ids in self.input_ids]

    @property
    def largest_token(self) -> int:
        """The largest token id of all samples."""
        return max(max(ids) for ids in self.input_ids)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"input_ids": self.input_ids[index]}
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample


class PadRight:
    """Collates samples into `input_ids` and `attention_mask` [B, S], and `labels` [B] if the samples have them.

    S is the longest sample's length; padding is on the right, so that causal models need no mask for it.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(sample) for sample in ids], batch_first=True),
        }
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch


class LabelledTokens(torch.utils.data.Dataset[Any]):
    """Samples in memory: token ids and one label per token."""

    def __init__(self, samples: list[tuple[list[int], list[int]]]):
        self._samples = samples

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample."""
        return [len(ids) for ids, _ in self._samples]

    @property
    def largest_token(self) -> int:
        """The largest token id of all samples."""
        return max(max(ids) for ids, _ in self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._samples[index]


class PadLabelled:
    """Collates samples into `input_ids`, `attention_mask` and `labels` [B, S], padded on the right."""

    def __init__(self, pad_token_id: int):
        self._pad_token_id = pad_token_id

    def __call__(self, samples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(ids) for ids, _ in samples]
        labels = [torch.tensor(labels) for _, labels in samples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(sample) for sample in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
