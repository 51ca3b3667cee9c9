"""A conversation with a model: its turns, and the session that keeps their keys and values on servers."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.errors import UnsupportedInputError
from petals_lightning.models.generation import GenerationSession
from petals_lightning.models.sampling import end_ids


class Conversation:
    """Turns of a user and a model. The model reads the whole conversation as the chat template writes it.

    Each turn sends only tokens that servers do not hold yet. If the template now writes earlier turns differently, or
    an answer becomes other tokens when it is tokenized again, the session goes back to the first difference.

    Args:
        model: with a language-model head.
        dialogue_format: how turns become tokens.
        session: the open session.
        system: text before all turns, or None.
        max_new_tokens: tokens of one reply, at most.
        options: further options of `generate`.

    Raises:
        DataError: the template refuses the system text, or a conversation of one question and one answer.
    """

    end_ids: list[int]
    """Tokens that end a turn of the model: its generation config's, the tokenizer's eos, and the template's."""

    def __init__(
        self,
        model: Any,
        dialogue_format: DialogueFormat,
        session: GenerationSession,
        *,
        system: str | None,
        max_new_tokens: int,
        **options: Any,
    ):
        self._model, self._format, self._session = model, dialogue_format, session
        self._max_new_tokens, self._options = max_new_tokens, options
        self._opening = [Message(role="system", content=system)] if system else []
        self.messages: list[Message] = list(self._opening)
        dialogue_format.prompt([*self._opening, Message(role="user", content="a")])
        self.end_ids = dialogue_format.ends_of_answers(end_ids(model))

    def reply(self, text: str, streamer: Any = None) -> tuple[str, int]:
        """Returns the model's answer to a turn of the user, and the number of its tokens.

        Raises:
            DataError: the template refuses the conversation.
            UnsupportedInputError: there is no room left for an answer.
            SwarmError: servers failed, and retries did not help.

        After an error the conversation is unchanged.
        """
        messages = [*self.messages, Message(role="user", content=text)]
        ids = self._format.prompt(messages)
        room = self._session.max_length - len(ids)
        if room < 1:
            raise UnsupportedInputError(
                f"the conversation has {len(ids)} tokens and room for {self._session.max_length}: /undo or /reset it, "
                "or start with a larger --max-length"
            )
        known = self._session.tokens[0].tolist() if self._session.tokens is not None else []
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, ids, strict=False)))
        same = min(same, len(ids) - 1)
        self._session.position = same
        new = torch.tensor([ids[same:]])
        out = self._model.generate(
            new,
            max_new_tokens=min(self._max_new_tokens, room),
            eos_token_id=self.end_ids or None,
            streamer=streamer,
            **self._options,
        )
        reply = out[0, new.shape[1] :].tolist()
        answer = self._format.decode(reply[:-1] if reply[-1] in self.end_ids else reply)
        self.messages = [*messages, Message(role="assistant", content=answer)]
        return answer, len(reply)

    def undo(self) -> bool:
        """Removes the last turn and its answer. Returns False if there is none."""
        if len(self.messages) == len(self._opening):
            return False
        self.messages = self.messages[:-2]
        return True

    def reset(self) -> None:
        self.messages = list(self._opening)

    def save(self, path: Path) -> None:
        """Appends the conversation to a jsonl file, as a dialogue that tuning can read."""
        with open(path, "a", encoding="utf-8") as file:
            print(json.dumps({"messages": self.messages}, ensure_ascii=False), file=file)
