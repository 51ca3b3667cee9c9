"""Dialogues as token ids, the same in training and in chat, and which of the tokens the assistant says.

A tokenizer with a chat template is used with it. Without one, dialogues have this form, where <bos> and <eos> are the
tokenizer's, a line break stands for a missing <eos>, and the assistant says what is behind each `Assistant:`

    <bos>SYSTEM TEXT\\nUser: …\\nAssistant: …<eos>User: …\\nAssistant: …<eos>

Every piece is tokenized for itself, so that the assistant's tokens are exactly known and do not depend on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from petals_lightning.data.tokenizers import IGNORED
from petals_lightning.errors import DataError

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn, as in OpenAI's format."""

    role: str
    content: str


@dataclass(frozen=True)
class _Piece:
    text: str
    is_said: bool = False  # by the assistant
    ends: bool = False  # with the end of a turn that the assistant says, too


class DialogueFormat:
    """Turns dialogues into token ids.

    Args:
        tokenizer: the model's.
        use_chat_template: False takes the simple form even if the tokenizer has a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, use_chat_template: bool = True):
        self._tokenizer = tokenizer
        self.has_template = use_chat_template and tokenizer.chat_template is not None

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a turn of the assistant."""
        eos = self._tokenizer.eos_token_id
        return [eos] if eos is not None else self._encode("\n")[-1:]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue, and as many labels: the ids themselves where the assistant speaks, else IGNORED.

        Raises:
            DataError: an unknown role, or a template that rewrites earlier turns when later ones follow.
        """
        input_ids: list[int] = self._start()
        labels = [IGNORED] * len(input_ids)
        for piece in self._template_pieces(messages) if self.has_template else _simple_pieces(messages):
            ids = self._encode(piece.text) + (self.end_ids if piece.ends else [])
            input_ids += ids
            labels += ids if piece.is_said else [IGNORED] * len(ids)
        return input_ids, labels

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant is to speak next."""
        if not self.has_template:
            return self.encode(messages)[0] + self._encode("Assistant:")
        before = self.encode(messages)[0]
        return before + self._encode(self._render(messages, speaks=True)[len(self._render(messages, speaks=False)) :])

    def decode(self, ids: Sequence[int]) -> str:
        """What the assistant has said."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _start(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and not self.has_template else []  # templates write it themselves

    def _template_pieces(self, messages: Sequence[Message]) -> list[_Piece]:
        pieces, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], speaks=True)
            after = self._render(messages[: index + 1], speaks=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    "the tokenizer's chat template rewrites earlier turns when later ones follow, so that the "
                    "assistant's tokens cannot be told; set data.use_chat_template=false for the simple form"
                )
            pieces += [_Piece(before[len(done) :]), _Piece(after[len(before) :], is_said=True)]
            done = after
        rest = self._render(messages, speaks=False)
        return [*pieces, _Piece(rest[len(done) :])]

    def _render(self, messages: Sequence[Message], *, speaks: bool) -> str:
        if not messages:
            return ""
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                tokenize=False,
                add_generation_prompt=speaks,
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _simple_pieces(messages: Sequence[Message]) -> list[_Piece]:
    pieces = []
    for message in messages:
        match message["role"]:
            case "system":
                pieces.append(_Piece(f"{message['content']}\n"))
            case "user":
                pieces.append(_Piece(f"User: {message['content']}\n"))
            case "assistant":
                pieces += [_Piece("Assistant:"), _Piece(f" {message['content']}", is_said=True, ends=True)]
            case role:
                raise DataError(f"a dialogue has a turn of {role!r}: roles are {', '.join(ROLES)}")
    return pieces
