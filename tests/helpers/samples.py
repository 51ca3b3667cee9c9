"""A data set of Hugging Face's Trainer."""

from __future__ import annotations

import torch

from tests.helpers.parity import right_padded_batch


class Samples(torch.utils.data.Dataset):
    """Samples of one length with padding, as a user's own data set gives them, with a column that no model takes."""

    def __init__(self, is_classification: bool):
        self._batch, self._is_classification = right_padded_batch(batch=12), is_classification

    def __len__(self) -> int:
        return len(self._batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {name: value[index] for name, value in self._batch.items()} | {"row": torch.tensor(index)}
        if not self._is_classification:
            sample["labels"] = sample["input_ids"].masked_fill(sample["attention_mask"] == 0, -100)
        return sample
