"""Sources of dialogues, and the DataModule that makes batches of them.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.base import Splits, TextDataModule
from petals_lightning.data.collate import IGNORED, LabelledTokens, PadLabelled
from petals_lightning.data.dialogue_format import ROLES, Answer, DialogueFormat, Message, samples
from petals_lightning.data.sources import BUNDLED
from petals_lightning.errors import ConfigurationError, DataError
from petals_lightning.sample import DIALOGUES_DIR

_ROW = "row in its file"  # the column of row numbers, which stay known when a validation part is split off

_TURNS = ("messages", "conversations", "conversation", "turns")

COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "system", "tools")
"""Columns of `read_dialogue` that may have other names."""

_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",  # OpenAI's newer name; templates know the older one
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""Names of `ROLES` in other formats."""


def read_dialogue(row: dict[str, Any], where: str) -> list[Message]:
    """Reads the turns of a row.

    It may have any of these forms:

    - `messages`, `conversations`, `conversation` or `turns`: a list of turns. A turn is an object with `role` and
      `content`, as in OpenAI's format, or with `from` and `value`, as in ShareGPT's; or a text, where the user begins
      and the speakers alternate. Content is a text or a list of text parts.
    - `prompt` and `completion` (or `response`): a question and its answer; texts, or lists of turns.
    - `instruction`, `output` and optionally `input`: Alpaca's form; the input follows the instruction.
    - `utterances`: PersonaChat's form. The last entry has the `history` and, as the last of its `candidates`, the true
      reply; a `personality` of the assistant comes first.

    Of several lists of turns, the first that is not empty is used. A text in `system` comes first in any form.

    Raises:
        DataError: the row has none of these forms; the message names the row.
    """
    system = row.get("system")
    lists = [row[name] for name in _TURNS if isinstance(row.get(name), list)]
    match row:
        case _ if lists:
            found = _turns(next(filter(None, lists), []), where)
        case {"prompt": prompt, "completion": answer} | {"prompt": prompt, "response": answer}:
            found = [*messages_of(prompt, "user", where), *messages_of(answer, "assistant", where)]
        case {"instruction": task, "output": answer}:
            texts = [_text(task, where), _text(row.get("input") or "", where)]
            found = _turns(["\n\n".join(text for text in texts if text), answer], where)
        case {"utterances": [*_, {"history": list(history), "candidates": [*_, str(reply)]}]}:
            found = _turns([*history, reply], where)
            system = system or " ".join(row.get("personality") or [])
        case _:
            raise DataError(
                f"{where} has {', '.join(sorted(row)) or 'nothing'}: a dialogue needs `turns` (texts), `messages` or "
                "`conversations` (of role and content, or from and value), `prompt` and `completion`, `instruction` "
                "and `output`, or PersonaChat's `utterances`; columns={'messages': …} names other columns"
            )
    return [Message(role="system", content=_text(system, where)), *found] if system else found


def messages_of(given: Any, role: str, where: str) -> list[Message]:
    """Messages of a question or an answer, which is a text or a list of messages. Raises DataError."""
    if isinstance(given, list):
        return _turns(given, where)
    return [Message(role=role, content=_text(given, where))]


def _turns(turns: list[Any], where: str) -> list[Message]:
    """Messages from objects, or from texts that are alternately the user's and the assistant's."""
    return [
        _message(turn, where)
        if isinstance(turn, dict)
        else Message(role=("user", "assistant")[number % 2], content=_text(turn, where))
        for number, turn in enumerate(turns)
    ]


def _message(given: dict[str, Any], where: str) -> Message:
    turn = {name: value for name, value in given.items() if value is not None}
    speaker = str(turn.pop("role", turn.pop("from", ""))).strip().lower()
    role = _ROLE_NAMES.get(speaker, speaker)
    if role not in ROLES:
        names = ", ".join((*ROLES, *_ROLE_NAMES))
        raise DataError(f"{where} has the message {given!r:.100}: it needs role and content; roles are {names}")
    content = turn.pop("content", turn.pop("value", "" if "tool_calls" in turn else None))
    return Message(role=role, content=_text(content, where), **turn)  # type: ignore[typeddict-item]


def _text(content: Any, where: str) -> str:
    """A text, or the joined text parts of a list."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise DataError(f"{where} has a turn without a text: {part!r:.60}")
        texts.append(text)
    return "".join(texts)


def _tools(given: Any, where: str) -> list[Any]:
    """Descriptions of tools, which may be a JSON string."""
    try:
        tools = json.loads(given) if isinstance(given, str) and given.strip() else given
    except json.JSONDecodeError as error:
        raise DataError(f"{where} has tools that are not JSON: {error}") from error
    if not isinstance(tools or [], list):
        raise DataError(f"{where} has {tools!r:.60} for tools: give a list of their descriptions")
    return tools or []


def _written(value: Any) -> Any:
    """A value without the empty fields that its objects inherited from other rows' objects."""
    match value:
        case dict():
            return {key: _written(item) for key, item in value.items() if item is not None}
        case list():
            return [_written(item) for item in value]
    return value


def split_dialogue(messages: list[Message], form: DialogueFormat, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Splits a dialogue into as few samples (token ids, labels) of up to `max_length` tokens as possible.

    Splits are made before a turn of the user, and every sample begins with the system's text. A single longer exchange
    is cut off at the end. Samples without tokens of the assistant are left out.

    Raises:
        DataError: as `DialogueFormat.answers`.
    """
    opening = [message for message in messages[:1] if message["role"] == "system"]
    exchanges: list[list[Message]] = []
    for message in messages[len(opening) :]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    window, answers, found = list(opening), list[Answer](), []
    for exchange in exchanges:
        new = list(form.answers([*window, *exchange], first=len(window)))
        if answers and new and len(new[-1].ids) > max_length:
            found += samples(answers)
            window, answers = list(opening), []
            new = list(form.answers([*window, *exchange], first=len(window)))
        window += exchange
        answers += new
    found += samples(answers)
    cut = [(ids[:max_length], labels[:max_length]) for ids, labels in found]
    return [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]


class DialogueDataModule(TextDataModule):
    """Batches `{"input_ids", "attention_mask", "labels"}`, each [B, S]; labels are -100 outside of answers.

    Token ids are those of `DialogueFormat`. A dialogue becomes several samples if it has more than `max_length` tokens,
    or if the template renders an answer differently once the next question follows.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or dialogues from elsewhere; see `TextDataModule`, and `read_dialogue` for the forms.
        limit: maximum dialogues per split, the first ones; None uses all.
        columns: the data's names of `COLUMNS`, if they are different, e.g.
            `{"prompt": "question", "completion": "reply"}`; then no other columns are read.
        use_chat_template: False uses the simple form even if the tokenizer has a chat template.
        merge_system: put the system's text before the first user turn, for templates without a system turn.
        options: as for `TextDataModule`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: a row is not a dialogue, the template refuses it, or there are no turns of the assistant.
    """

    bundled = DIALOGUES_DIR
    bundled_texts = "dialogues"
    known_columns: tuple[str, ...] = COLUMNS
    """Columns that may have other names."""

    def __init__(
        self,
        tokenizer: str,
        source: str = BUNDLED,
        *,
        limit: int | None = None,
        columns: Mapping[str, str | None] | None = None,
        use_chat_template: bool = True,
        merge_system: bool = False,
        max_length: int = 256,
        batch_size: int = 16,
        **options: Any,
    ):
        super().__init__(tokenizer, source, max_length=max_length, batch_size=batch_size, **options)
        if limit is not None and limit < 1:
            raise ConfigurationError(f"limit={limit}: must be at least 1, or None to take all")
        if unknown := set(columns or {}) - set(self.known_columns):
            names = ", ".join(sorted(unknown))
            raise ConfigurationError(f"columns={columns}: names {names}; give {', '.join(self.known_columns)}")
        self.limit = limit
        self.columns = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self.use_chat_template, self.merge_system = use_chat_template, merge_system

    def encoded(self, raw: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        form = DialogueFormat(tokenizer, use_chat_template=self.use_chat_template, merge_system=self.merge_system)
        for split, rows in raw.items():
            for column in self.columns.values():
                if column not in rows.column_names:
                    there = ", ".join(rows.column_names)
                    raise DataError(
                        f"columns={self.columns}: {split} of {self.source} has no column {column!r}; it has {there}"
                    )
        numbered = {split: rows.add_column(_ROW, list(range(len(rows)))) for split, rows in raw.items()}
        return {
            split: self._samples(split if split in raw else "train", rows, form)
            for split, rows in self.with_validation(numbered).items()
        }

    def collate(self, pad_token_id: int) -> Any:
        return PadLabelled(pad_token_id)

    @property
    def description(self) -> str:
        return f"dialogues of up to {self.max_length} tokens"

    def _samples(self, split: str, rows: datasets.Dataset, form: DialogueFormat) -> Any:
        rows = rows.select(range(min(len(rows), self.limit))) if self.limit is not None else rows
        exact = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Json)]
        found: list[Any] = []
        for row in rows:
            where = f"row {row.pop(_ROW)} of {split} of {self.source}"
            # JSON columns keep objects unchanged; in other columns, objects have the keys of all rows.
            row = {name: value if name in exact else _written(value) for name, value in row.items()}
            if self.columns:
                row = {ours: row[theirs] for ours, theirs in self.columns.items()}
            row = {name: value for name, value in row.items() if value is not None}
            tools = _tools(row.get("tools"), where)
            found += self._encoded_row(row, form.with_tools(tools) if tools else form, where)
        return self._dataset(found, split, rows)

    def _encoded_row(self, row: dict[str, Any], form: DialogueFormat, where: str) -> list[Any]:
        """The samples of a row. Raises DataError."""
        messages = read_dialogue(row, where)
        try:
            return split_dialogue(messages, form, self.max_length)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def _dataset(self, found: list[Any], split: str, rows: datasets.Dataset) -> Any:
        """The samples of a split. Raises DataError if there are none."""
        if not found:
            raise DataError(
                f"{split} of {self.source}: the assistant has no turns in {len(rows)} dialogues, or none to train on "
                f"within max_length={self.max_length} tokens (the second speaker is the assistant if there are no "
                "roles)"
            )
        return LabelledTokens(found)
