"""The base of all DataModules: the source of texts, and batches of similar length."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import datasets
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.loader import LengthGroupedSampler, ResumableDataLoader
from petals_lightning.data.opening import TextFormat
from petals_lightning.data.sources import BUNDLED, LocatedSplits, load_splits
from petals_lightning.errors import ConfigurationError, DataError
from petals_lightning.hf.tokenizer import load_tokenizer
from petals_lightning.sample import REVIEWS_DIR

log = logging.getLogger(__name__)

_EVAL_BATCHES = 4  # training batches in an evaluation batch, which needs no memory for a backward

Splits = dict[str, datasets.Dataset]


class Samples(Protocol):
    """Samples in memory whose lengths in tokens are known."""

    @property
    def lengths(self) -> list[int]: ...

    @property
    def largest_token(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class TextDataModule(pl.LightningDataModule):
    """Batches of texts. Subclasses turn rows into samples (`encoded`) and samples into a batch (`collate`).

    S is the length of a batch's longest sample; padding is on the right. Training batches group samples of similar
    length, in an order that changes every epoch and is fixed by the seed. A resumed run continues in the middle of an
    epoch. A missing validation part is split from the training part. Nothing is written to disk except `datasets`'
    cache of the hub.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled` (the sample in this package), a hub dataset id, or a file or folder in jsonl, json, csv, tsv,
            txt, parquet or arrow, also compressed (.gz, …);
            a folder may be the clone of a hub dataset, or of `save_to_disk`.
        name: the configuration of a hub dataset, e.g. `sst2` of `nyu-mll/glue`.
        train_split, validation_split, test_split: names of splits or files (without suffix) if they are unusual.
        encoding: of text files; None: by the byte order mark, or UTF-8.
        delimiter: between the cells of csv and tsv files; None detects it.
        validation_fraction: share of the training part that becomes a missing validation part.
        max_length: maximum tokens per sample.
        batch_size: samples per training batch.
        eval_batch_size: samples per validation, test or prediction batch; None means 4 × `batch_size`. A swarm
            processes one batch at a time, split into micro-batches, so a larger batch keeps it busier.
        seed: fixes the order of training batches and the split of a missing validation part.
        tokenizer_revision: the model's revision on the hub.
        token: for private models on the hub; None uses the login of this machine.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
        DataError (in `setup`): there are no data, or they have the wrong form.
        CheckpointError (in `setup`): the model has no usable tokenizer.
    """

    bundled: Path = REVIEWS_DIR
    """The folder of the source `bundled`."""
    bundled_texts = "reviews"
    """A description of that folder's data, for people."""
    real_data = "data.source=PATH"
    """Settings of a run that use real texts instead."""

    def __init__(
        self,
        tokenizer: str,
        source: str = BUNDLED,
        *,
        name: str | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        encoding: str | None = None,
        delimiter: str | None = None,
        validation_fraction: float = 0.1,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        seed: int = 0,
        tokenizer_revision: str | None = None,
        token: str | None = None,
    ):
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_length": max_length}
        for setting, value in sizes.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"{setting}={value}: must be at least 1")
        if not 0 < validation_fraction < 1:
            raise ConfigurationError(f"validation_fraction={validation_fraction}: must be between 0 and 1")
        self.tokenizer_name, self.tokenizer_revision, self.token = tokenizer, tokenizer_revision, token
        self.source, self.name = source, name
        self.text_format = TextFormat(encoding, delimiter)
        named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.split_names = {split: given for split, given in named.items() if given is not None}
        self.validation_fraction, self.seed = validation_fraction, seed
        self.max_length, self.batch_size = max_length, batch_size
        self.eval_batch_size = eval_batch_size or _EVAL_BATCHES * batch_size
        self._splits: dict[str, Any] = {}
        self._pad_token_id = 0
        self._collate: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenizes all data, once."""
        # In-memory token ids need no workers, which would be forked from a process with many threads.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        if self._splits:
            return
        raw = load_splits(
            self.source, self.name, split_names=self.split_names, bundled=self.bundled, form=self.text_format
        )
        tokenizer = load_tokenizer(self.tokenizer_name, revision=self.tokenizer_revision, token=self.token)
        self._pad_token_id = tokenizer.pad_token_id
        self._collate = self.collate(tokenizer.pad_token_id)
        self._splits = dict(self.encoded(raw, tokenizer))

    def encoded(self, raw: LocatedSplits, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """`Samples` of each split, including `validation`."""
        raise NotImplementedError

    def collate(self, pad_token_id: int) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        """A function that makes a batch of samples."""
        raise NotImplementedError

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test part with labels."""
        return "test" in self._splits

    @property
    def sizes(self) -> dict[str, int]:
        """The number of samples of each split."""
        return {split: len(samples) for split, samples in self._splits.items()}

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sample of all splits."""
        return max((max(samples.lengths, default=0) for samples in self._splits.values()), default=0)

    @property
    def largest_token(self) -> int:
        """The largest token id of all splits, including the padding's."""
        found = [samples.largest_token for samples in self._splits.values() if len(samples)]
        return max([*found, self._pad_token_id])

    @property
    def description(self) -> str:
        """A description of the samples, for people."""
        raise NotImplementedError

    def train_dataloader(self) -> ResumableDataLoader:
        samples = self._splits["train"]
        return ResumableDataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=LengthGroupedSampler(samples.lengths, self.batch_size, self.seed),
            collate_fn=self._collate,
            batches_done=self._batches_done,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._by_length(self._splits["validation"])

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part; without one, or without labels, the validation part."""
        if not self.has_labelled_test:
            log.warning("%s has no labelled test part: testing on validation", self.source)
            return self.val_dataloader()
        return self._by_length(self._splits["test"])

    def with_validation(self, raw: Splits) -> Splits:
        """The splits; a missing `validation` is split from the rows of `train`."""
        if "validation" in raw:
            return raw
        if len(raw["train"]) < 2:
            raise DataError(f"{self.source} has one row and no validation part: give more rows, or a validation file")
        # Row numbers are split, not rows: `datasets` would write files into the folder from which a split is mapped.
        numbers = datasets.Dataset.from_dict({"row": range(len(raw["train"]))})
        cut = numbers.train_test_split(self.validation_fraction, seed=self.seed)
        log.info("%s has no validation part: %d rows of train", self.source, len(cut["test"]))
        train, validation = (raw["train"].select(cut[part]["row"][:]) for part in ("train", "test"))
        return {**raw, "train": train, "validation": validation}

    def _by_length(self, samples: Any) -> DataLoader[Any]:
        # Longest first: a batch that is too large for memory fails at once. The order does not change metrics.
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
