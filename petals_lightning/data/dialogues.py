"""Where dialogues come from, and the DataModule that makes batches of them.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import datasets
import pytorch_lightning as pl
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset

from petals_lightning.data.dialogue_format import IGNORED, ROLES, DialogueFormat, Message
from petals_lightning.data.loader import LengthGroupedSampler, ResumableDataLoader
from petals_lightning.data.sources import load_splits
from petals_lightning.data.tokenizers import load_tokenizer
from petals_lightning.errors import ConfigurationError, DataError

log = logging.getLogger(__name__)


def read_dialogue(row: dict[str, Any], where: str) -> list[Message]:
    """The turns of a row in any of three forms.

    `messages`: a list of role and content, as OpenAI's; `turns`: a list of texts of user and assistant in turn;
    PersonaChat's `utterances`, whose last entry has the `history` and, as the last of its `candidates`, the true reply,
    with a `personality` of the assistant that stands in front.

    Raises:
        DataError: it is none of these; the message says where.
    """
    match row:
        case {"messages": list(messages)}:
            found = [_message(message, where) for message in messages]
        case {"turns": list(turns)}:
            found = _alternating(turns)
        case {"utterances": [*_, {"history": list(history), "candidates": [*_, str(reply)]}]}:
            persona = row.get("personality") or []
            opening = [Message(role="system", content=" ".join(persona))] if persona else []
            found = [*opening, *_alternating([*history, reply])]
        case _:
            raise DataError(
                f"{where} has {', '.join(sorted(row))}: a dialogue needs `turns` (texts), `messages` (role and "
                "content) or PersonaChat's `utterances`"
            )
    for message in found:
        if not isinstance(message["content"], str):
            raise DataError(f"{where} has a turn without a text: {message['content']!r:.60}")
    return found


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise DataError(f"{where} has the message {message!r:.100}: it needs role ({', '.join(ROLES)}) and content")
    return Message(role=message["role"], content=message.get("content"))  # type: ignore[typeddict-item]


def _alternating(texts: Iterable[str]) -> list[Message]:
    return [Message(role=ROLES[1 + number % 2], content=text) for number, text in enumerate(texts)]


def windows(messages: list[Message], form: DialogueFormat, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Cuts a dialogue into samples (token ids, labels) of up to `max_length` tokens, as few as possible.

    Cuts are in front of a turn of the user; what the system says stands in front of every sample. A single exchange
    that is longer is cut off at the end. Samples without anything that the assistant says are left out.
    """
    opening = [message for message in messages[:1] if message["role"] == "system"]
    exchanges: list[list[Message]] = []
    for message in messages[len(opening) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    samples, current = [], list(opening)
    encoded: tuple[list[int], list[int]] | None = None
    for exchange in exchanges:
        longer = form.encode([*current, *exchange])
        if encoded is not None and len(longer[0]) > max_length:
            samples.append(encoded)
            current, longer = list(opening), form.encode([*opening, *exchange])
        current, encoded = [*current, *exchange], longer
    if encoded is not None:
        samples.append(encoded)
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in samples]
    return [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]


class EncodedDialogues(Dataset):
    """Samples of token ids and labels in memory."""

    def __init__(self, samples: list[tuple[list[int], list[int]]]):
        self._samples = samples

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(ids) for ids, _ in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._samples[index]


class PadDialogues:
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


class DialogueDataModule(pl.LightningDataModule):
    """Batches `{"input_ids", "attention_mask", "labels"}`, each [B, S]; labels are -100 but where the assistant speaks.

    Token ids are those of `DialogueFormat`; dialogues of more than `max_length` tokens become several samples.

    Args:
        tokenizer: the model's hub id or folder.
        source: a hub dataset id, or a file or folder in jsonl or parquet; see `read_dialogue` for the forms.
        name: the configuration of a hub dataset.
        train_split, validation_split, test_split: names of splits or files (without suffix) where they are unusual.
        validation_fraction: share of the training part that becomes validation where there is none.
        limit: dialogues a split at most, the first ones; None takes all.
        max_length: tokens a sample at most.
        use_chat_template: False takes the simple form even if the tokenizer has a chat template.
        batch_size: samples a training batch.
        eval_batch_size: samples a validation or test batch; None takes `batch_size`.
        seed: fixes the order of training batches and the cut of a missing validation part.
        tokenizer_revision, token: for the tokenizer on the hub.

    Raises (in `setup`):
        DataError: nothing is there, a row is no dialogue, or the assistant never speaks.
        CheckpointError: the model has no usable tokenizer.
    """

    def __init__(
        self,
        tokenizer: str,
        source: str,
        name: str | None = None,
        train_split: str | None = None,
        validation_split: str | None = None,
        test_split: str | None = None,
        validation_fraction: float = 0.1,
        limit: int | None = None,
        max_length: int = 256,
        use_chat_template: bool = True,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 0,
        tokenizer_revision: str | None = None,
        token: str | None = None,
    ):
        super().__init__()
        for setting, value in {"batch_size": batch_size, "max_length": max_length, "limit": limit}.items():
            if value is not None and value < 1:
                raise ConfigurationError(f"data.{setting}={value}: must be at least 1")
        if not 0 < validation_fraction < 1:
            raise ConfigurationError(f"data.validation_fraction={validation_fraction}: must be between 0 and 1")
        self.tokenizer_name, self.tokenizer_revision, self.token = tokenizer, tokenizer_revision, token
        self.source, self.name, self.limit = source, name, limit
        named = {"train": train_split, "validation": validation_split, "test": test_split}
        self.split_names = {split: given for split, given in named.items() if given is not None}
        self.validation_fraction, self.seed = validation_fraction, seed
        self.max_length, self.use_chat_template = max_length, use_chat_template
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self._splits: dict[str, EncodedDialogues] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenizes everything, once."""
        # In-memory token ids need no worker processes, and those would be forked from a process full of threads.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        if self._splits:
            return
        raw = load_splits(self.source, self.name, split_names=self.split_names)
        if "validation" not in raw:
            cut = raw["train"].train_test_split(self.validation_fraction, seed=self.seed)
            raw["train"], raw["validation"] = cut["train"], cut["test"]
            log.info("%s has no validation part: %d rows of train", self.source, len(raw["validation"]))
        tokenizer = load_tokenizer(self.tokenizer_name, revision=self.tokenizer_revision, token=self.token)
        self._collate = PadDialogues(tokenizer.pad_token_id)
        form = DialogueFormat(tokenizer, use_chat_template=self.use_chat_template)
        self._splits = {split: self._encoded(split, rows, form) for split, rows in raw.items()}

    @property
    def has_labelled_test(self) -> bool:
        """Whether there is a test part."""
        return "test" in self._splits

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each split."""
        return {split: len(samples) for split, samples in self._splits.items()}

    @property
    def description(self) -> str:
        """What the samples are, for people."""
        return f"dialogues of up to {self.max_length} tokens"

    def train_dataloader(self) -> ResumableDataLoader:
        samples = self._splits["train"]
        sampler = LengthGroupedSampler(samples.lengths, self.batch_size, self.seed)
        return ResumableDataLoader(samples, sampler, self._collate, self._batches_done)

    def val_dataloader(self) -> DataLoader:
        return self._by_length(self._splits["validation"])

    def test_dataloader(self) -> DataLoader:
        """The test part, or validation where there is none."""
        return self._by_length(self._splits["test" if self.has_labelled_test else "validation"])

    def _encoded(self, split: str, rows: datasets.Dataset, form: DialogueFormat) -> EncodedDialogues:
        rows = rows.select(range(min(len(rows), self.limit))) if self.limit is not None else rows
        samples = []
        for number, row in enumerate(rows):
            present = {name: value for name, value in row.items() if value is not None}
            messages = read_dialogue(present, f"row {number} of {split} of {self.source}")
            samples += windows(messages, form, self.max_length)
        if not samples:
            raise DataError(
                f"{split} of {self.source}: the assistant says nothing in {len(rows)} dialogues (the second speaker is "
                "the assistant where roles are not given)"
            )
        return EncodedDialogues(samples)

    def _by_length(self, samples: EncodedDialogues) -> DataLoader:
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
