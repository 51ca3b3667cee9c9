"""The DataModule for any labelled texts."""

from __future__ import annotations

import logging
import warnings

import datasets
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader

from petals_lightning.data.columns import LabelEncoder, find_label_column, find_text_column
from petals_lightning.data.loader import LengthGroupedSampler, ResumableDataLoader
from petals_lightning.data.sources import load_splits
from petals_lightning.data.tokenizers import EncodedTexts, PadRight, load_tokenizer
from petals_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)


class TextClassificationDataModule(pl.LightningDataModule):
    """Batches `{"input_ids": [B, S], "attention_mask": [B, S], "labels": [B]}` for classifying texts.

    S is the longest text of the batch; padding is on the right. Training batches group texts of similar length, in
    another order each epoch, fixed by the seed; a resumed run continues in the middle of an epoch. A validation part
    that is missing is cut from the training part. Nothing is written to disk except what `datasets` caches of the hub.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled` (the sample in this package), a hub dataset id, or a file or folder in jsonl, tsv, csv or
            parquet.
        name: the configuration of a hub dataset, e.g. `sst2` of `nyu-mll/glue`.
        text_column: None finds it by name.
        text_pair_column: the second text of a sample, for tasks on pairs.
        label_column: None finds it by name.
        num_labels: classes; None counts them in the training part.
        train_split, validation_split, test_split: names of splits or files (without suffix) where they are unusual.
        validation_fraction: share of the training part that becomes validation where there is none.
        max_length: tokens a text at most; longer ones are cut.
        batch_size: texts a training batch.
        eval_batch_size: texts a validation, test or prediction batch; None takes `batch_size`.
        seed: fixes the order of training batches and the cut of a missing validation part.
        tokenizer_revision: the model's revision on the hub.
        token: for private models on the hub; None uses the login of this machine.

    Raises (in `setup`):
        DataError: nothing is there, there is no label column, or labels are outside `num_labels`.
        CheckpointError: the model has no usable tokenizer.
    """

    num_labels: int
    """Number of classes; known after `setup`."""
    class_names: tuple[str, ...]
    """Their names; known after `setup`."""

    def __init__(
        self,
        tokenizer: str,
        source: str = "bundled",
        name: str | None = None,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        num_labels: int | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_fraction: float = 0.1,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        seed: int = 0,
        tokenizer_revision: str | None = None,
        token: str | None = None,
    ):
        super().__init__()
        for setting, value in {"batch_size": batch_size, "max_length": max_length}.items():
            if value < 1:
                raise ConfigurationError(f"data.{setting}={value}: must be at least 1")
        if not 0 < validation_fraction < 1:
            raise ConfigurationError(f"data.validation_fraction={validation_fraction}: must be between 0 and 1")
        if num_labels is not None and num_labels < 2:
            raise ConfigurationError(f"data.num_labels={num_labels}: must be at least 2, or null to count the classes")
        self.tokenizer_name, self.tokenizer_revision, self.token = tokenizer, tokenizer_revision, token
        self.source, self.name = source, name
        self.text_column, self.text_pair_column, self.label_column = text_column, text_pair_column, label_column
        self.requested_num_labels = num_labels
        named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.split_names = {split: given for split, given in named.items() if given is not None}
        self.validation_fraction, self.seed = validation_fraction, seed
        self.max_length, self.batch_size = max_length, batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self._splits: dict[str, EncodedTexts] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenizes everything, once."""
        # In-memory token ids need no worker processes, and those would be forked from a process full of threads.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        if self._splits:
            return
        raw = load_splits(self.source, self.name, split_names=self.split_names)
        text = find_text_column(raw["train"], self.text_column)
        label = find_label_column(raw["train"], self.label_column, where=self.source)
        if "validation" not in raw:
            cut = raw["train"].train_test_split(self.validation_fraction, seed=self.seed)
            raw["train"], raw["validation"] = cut["train"], cut["test"]
            log.info("%s has no validation part: %d rows of train", self.source, len(raw["validation"]))
        encoder = LabelEncoder(raw["train"], label, self.requested_num_labels)
        self.num_labels, self.class_names = len(encoder.names), encoder.names
        tokenizer = load_tokenizer(self.tokenizer_name, revision=self.tokenizer_revision, token=self.token)
        self._collate = PadRight(tokenizer.pad_token_id)
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
        self._splits = splits

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test part with labels."""
        return "test" in self._splits and self._splits["test"].labels is not None

    @property
    def description(self) -> str:
        """What the samples are, for people."""
        return f"{self.num_labels} classes"

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each split."""
        return {split: len(samples) for split, samples in self._splits.items()}

    def train_dataloader(self) -> ResumableDataLoader:
        samples = self._splits["train"]
        sampler = LengthGroupedSampler(samples.lengths, self.batch_size, self.seed)
        return ResumableDataLoader(samples, sampler, self._collate, self._batches_done)

    def val_dataloader(self) -> DataLoader:
        return self._by_length(self._splits["validation"])

    def test_dataloader(self) -> DataLoader:
        """The test part; where it has no labels, or there is none, validation stands in for it."""
        if not self.has_labelled_test:
            log.warning("%s has no labelled test part: testing on validation", self.source)
            return self.val_dataloader()
        return self._by_length(self._splits["test"])

    def predict_dataloader(self) -> DataLoader:
        """The test part, or else validation, in the order of the file."""
        samples = self._splits.get("test") or self._splits["validation"]
        return DataLoader(
            samples, batch_size=self.eval_batch_size, collate_fn=self._collate, generator=torch.Generator()
        )

    def _by_length(self, samples: EncodedTexts) -> DataLoader:
        # Longest first: a batch that is too large for memory fails at once. Metrics do not depend on the order.
        order = sorted(range(len(samples)), key=samples.lengths.__getitem__, reverse=True)
        return DataLoader(
            samples,
            batch_sampler=BatchSampler(order, self.eval_batch_size, drop_last=False),
            collate_fn=self._collate,
            generator=torch.Generator(),
        )

    def _batches_done(self) -> int:
        if self.trainer is None:  # used without Lightning
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]


def _column(rows: datasets.Dataset, name: str) -> list[str]:
    return rows[name][:]
