"""Where dialogues come from, and the DataModule that makes batches of them.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.base import Splits, TextDataModule
from petals_lightning.data.dialogue_format import IGNORED, ROLES, DialogueFormat, Message
from petals_lightning.data.tokenizers import LabelledTokens, PadLabelled
from petals_lightning.errors import ConfigurationError, DataError
from petals_lightning.sample import DIALOGUES_DIR


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


class DialogueDataModule(TextDataModule):
    """Batches `{"input_ids", "attention_mask", "labels"}`, each [B, S]; labels are -100 but where the assistant speaks.

    Token ids are those of `DialogueFormat`; dialogues of more than `max_length` tokens become several samples.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or dialogues from elsewhere; see `TextDataModule`, and `read_dialogue` for the forms.
        limit: dialogues a split at most, the first ones; None takes all.
        use_chat_template: False takes the simple form even if the tokenizer has a chat template.
        options: as of `TextDataModule`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: a row is no dialogue, or the assistant never speaks.
    """

    bundled = DIALOGUES_DIR

    def __init__(
        self,
        tokenizer: str,
        source: str = "bundled",
        *,
        limit: int | None = None,
        use_chat_template: bool = True,
        max_length: int = 256,
        batch_size: int = 16,
        **options: Any,
    ):
        super().__init__(tokenizer, source, max_length=max_length, batch_size=batch_size, **options)
        if limit is not None and limit < 1:
            raise ConfigurationError(f"data.limit={limit}: must be at least 1, or null to take all")
        self.limit, self.use_chat_template = limit, use_chat_template

    def encoded(self, raw: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, LabelledTokens]:
        form = DialogueFormat(tokenizer, use_chat_template=self.use_chat_template)
        return {split: self._samples(split, rows, form) for split, rows in self.with_validation(raw).items()}

    def collate(self, pad_token_id: int) -> PadLabelled:
        return PadLabelled(pad_token_id)

    @property
    def description(self) -> str:
        return f"dialogues of up to {self.max_length} tokens"

    def _samples(self, split: str, rows: datasets.Dataset, form: DialogueFormat) -> LabelledTokens:
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
        return LabelledTokens(samples)
