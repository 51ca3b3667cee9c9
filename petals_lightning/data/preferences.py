"""Pairs of answers of which one is preferred, and the DataModule that makes batches of them.

Shapes: B pairs, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from petals_lightning.data.collate import IGNORED, PadLabelled
from petals_lightning.data.dialogue_format import Answer, DialogueFormat, Message
from petals_lightning.data.dialogues import DialogueDataModule, messages_of
from petals_lightning.errors import DataError
from petals_lightning.sample import PREFERENCES_DIR

Sample = tuple[list[int], list[int]]
"""Token ids, and labels: the ids of the answer, IGNORED before it."""


def read_preference(row: dict[str, Any], where: str) -> tuple[list[Message], list[Message]]:
    """Reads the dialogue that is preferred and the other one; both end with a turn of the assistant.

    A row has `chosen` and `rejected`: texts, or lists of turns. They follow its `prompt`, also a text or a list of
    turns; without one they are whole dialogues. This is the format of TRL and of most datasets of preferences.

    Raises:
        DataError: the row has another form; the message names it.
    """
    if not {"chosen", "rejected"} <= row.keys():
        raise DataError(
            f"{where} has {', '.join(sorted(row)) or 'nothing'}: a preference needs `chosen` and `rejected`, and maybe "
            "`prompt`; columns={'chosen': …} names other columns"
        )
    prompt = messages_of(row["prompt"], "user", where) if "prompt" in row else []
    system = [Message(role="system", content=row["system"])] if isinstance(row.get("system"), str) else []
    chosen, rejected = (
        [*system, *prompt, *messages_of(row[name], "assistant", where)] for name in ("chosen", "rejected")
    )
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: {name} must end with a turn of the assistant that follows another turn")
    return chosen, rejected


class PreferencePairs(torch.utils.data.Dataset[Any]):
    """Pairs in memory: samples of the chosen and the rejected answer."""

    def __init__(self, pairs: list[tuple[Sample, Sample]]):
        self._pairs = pairs

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each pair's longer sample."""
        return [max(len(ids) for ids, _ in pair) for pair in self._pairs]

    @property
    def largest_token(self) -> int:
        """The largest token id of all samples."""
        return max(max(ids) for pair in self._pairs for ids, _ in pair)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Sample, Sample]:
        return self._pairs[index]


class PadPairs:
    """Collates B pairs as `PadLabelled` does 2·B samples: first the chosen ones, then the rejected ones."""

    def __init__(self, pad_token_id: int):
        self._pad = PadLabelled(pad_token_id)

    def __call__(self, pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, torch.Tensor]:
        return self._pad([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])


class PreferenceDataModule(DialogueDataModule):
    """Batches `{"input_ids", "attention_mask", "labels"}`, each [2·B, S]: B chosen answers, then B rejected ones.

    Labels are -100 outside of the last answer, which is what a preference is about. Pairs whose answers do not begin
    within `max_length` tokens are left out; longer ones are cut off at the end.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or preferences from elsewhere; see `read_preference` for the forms.
        batch_size: pairs per training batch.
        options: as for `DialogueDataModule`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: a row is not a preference, or the template refuses it.
    """

    bundled = PREFERENCES_DIR
    bundled_texts = "preferences"
    known_columns = ("prompt", "chosen", "rejected", "system", "tools")

    @property
    def description(self) -> str:
        return f"pairs of answers, dialogues of up to {self.max_length} tokens"

    def collate(self, pad_token_id: int) -> Any:
        return PadPairs(pad_token_id)

    def _encoded_row(self, row: dict[str, Any], form: DialogueFormat, where: str) -> list[Any]:
        dialogues = read_preference(row, where)
        try:
            pair = [self._sample(messages, form) for messages in dialogues]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return [tuple(pair)] if all(any(label != IGNORED for label in labels[1:]) for _, labels in pair) else []

    def _sample(self, messages: list[Message], form: DialogueFormat) -> Sample:
        answer = next(form.answers(messages, first=len(messages) - 1), Answer([], 0, 0))  # none if its weight is 0
        labels = [IGNORED] * answer.start + answer.ids[answer.start : answer.end]
        return answer.ids[: answer.end][: self.max_length], labels[: self.max_length]

    def _dataset(self, found: list[Any], split: str, rows: datasets.Dataset) -> Any:
        if not found:
            raise DataError(
                f"{split} of {self.source}: no answer of {len(rows)} pairs begins within max_length={self.max_length} "
                "tokens"
            )
        return PreferencePairs(found)
