r"""Dialogues as token ids, equal in training and in chat, and which of the tokens are the assistant's.

All token ids are those of `apply_chat_template` for a whole dialogue. They are never joined from pieces, because
templates may render earlier turns differently once later ones follow, and tokenizers may split the start of a text
differently from its middle. See `DialogueFormat.answers` for how the assistant's tokens are found.

A tokenizer without a chat template uses this one, with a line break in place of a missing <eos>:

    <bos>SYSTEM TEXT\\nUser: …\\nAssistant: …<eos>User: …\\nAssistant: …<eos>
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any, NamedTuple, NotRequired, TypedDict

import jinja2
from transformers import PreTrainedTokenizerBase

from petals_lightning.data.collate import IGNORED
from petals_lightning.errors import DataError

ROLES = ("system", "user", "assistant", "tool")

_SIMPLE_TEMPLATE = """{{ bos_token }}
{%- if tools %}{{ raise_exception('the simple form has no tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content + '\\n' }}
    {%- elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}
    {%- elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + (eos_token or '\\n') }}
    {%- else %}{{ raise_exception('the simple form has no turns of ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""


class Message(TypedDict):
    """One turn, as in OpenAI's format; the template gets all its fields."""

    role: str
    content: str
    weight: NotRequired[int]
    """0: do not train on this turn of the assistant."""
    name: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


class Answer(NamedTuple):
    """The tokens of a dialogue up to the end of a turn of the assistant, whose own are those from `start` to `end`."""

    ids: list[int]
    start: int
    end: int

    def is_within(self, ids: list[int]) -> bool:
        """Whether a longer dialogue has the same tokens up to the end of this answer."""
        return ids[: self.end] == self.ids[: self.end]


class DialogueFormat:
    """Turns dialogues into token ids.

    Args:
        tokenizer: of the model.
        use_chat_template: False uses the simple form even if the tokenizer has a template.
        merge_system: put the system's text before the first user turn, for templates without a system turn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, use_chat_template: bool = True, merge_system: bool = False
    ):
        self._tokenizer, self._use_chat_template, self._merge_system = tokenizer, use_chat_template, merge_system
        self._tools: list[Any] | None = None
        self.has_template = use_chat_template and tokenizer.chat_template is not None

    def with_tools(self, tools: list[Any]) -> DialogueFormat:
        """The same format for dialogues with these tools, which the template describes to the assistant."""
        form = copy(self)
        form._tools = tools
        return form

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a turn of the assistant: the tokenizer's eos, and the template's text after a turn.

        Raises:
            DataError: the template refuses a dialogue of one question and one answer, or omits the messages' contents.
        """
        question = Message(role="user", content="a")
        one, other = (self._render([question, Message(role="assistant", content=said)]) for said in "bc")
        if one == other:
            raise DataError(
                "the chat template omits the messages' contents (is it for lists of content parts only?); "
                "use_chat_template=False (chat: --no-chat-template) uses the simple form"
            )
        tail = self._tokenize(one[len(one) - _count_equal(one[::-1], other[::-1]) :])
        added = self._tokenizer.added_tokens_decoder
        ends = [self._tokenizer.eos_token_id, next((token for token in tail if token in added), None)]
        return list(dict.fromkeys(end for end in ends if end is not None)) or tail[-1:]

    def ends_of_answers(self, named: Sequence[int]) -> list[int]:
        """The tokens at which generation ends: those that the model's generation config names, and `end_ids`."""
        return list(dict.fromkeys([*named, *self.end_ids]))

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue, and as many labels: the ids themselves in the assistant's turns, else IGNORED.

        Turns that the template now renders differently from when the assistant gave them have no labels. They become
        separate samples, see `samples`.

        Raises:
            DataError: as `answers`.
        """
        ids = self._tokenize(self._render(messages))
        return _labelled(ids, [answer for answer in self.answers(messages) if answer.is_within(ids)])

    def answers(self, messages: Sequence[Message], first: int = 0) -> Iterator[Answer]:
        """The turns of the assistant among `messages[first:]`, each with the tokens before it, as in a chat.

        A turn's tokens are those that follow its prompt, up to the first token that ends a turn. If the template does
        not begin the turn with its prompt, the answer is the part that depends on its content. That part follows the
        same text (DeepSeek-R1's prompt goes on with <think>), or the prompt, if the template renders earlier turns
        differently once the answer is there (Mistral drops the system's text).

        Raises:
            DataError: the template refuses the dialogue, or the answer's tokens cannot be found in its output.
        """
        for index, message in enumerate(messages):
            if index >= first and message["role"] == "assistant" and message.get("weight") != 0:
                yield self._answer(messages[:index], message)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of the assistant's next turn.

        Raises:
            DataError: the template refuses the dialogue.
        """
        return self._tokenize(self._render(messages, add_generation_prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the assistant's tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _answer(self, before: Sequence[Message], message: Message) -> Answer:
        text = self._render([*before, message])
        prompt = self._render(before, add_generation_prompt=True) if before else ""
        ids, begin = self._tokenize(text), len(prompt)
        if not before or not text.startswith(prompt):
            begin = self._find_content(text, before, message["content"])
        if text.startswith(prompt[:begin]):
            start = self._count_tokens(ids, text, begin)
        else:
            begin = self._find_prompt(text[:begin], prompt, before[-1]["content"], message["content"])
            answer_ids = ids[self._count_tokens(ids, text, begin) :]
            ids = self._tokenize(prompt)
            start = len(ids)
            ids += answer_ids
        end = next((at + 1 for at in range(start, len(ids)) if ids[at] in self.end_ids), len(ids))
        return Answer(ids, start, end)

    def _find_content(self, text: str, before: Sequence[Message], content: str) -> int:
        """The position in a text at which the last turn's content begins: where another content changes the text."""
        another = Message(role="assistant", content="c" if content.lstrip().startswith("b") else "b")
        other = self._render([*before, another])
        begin = _count_equal(text, other)
        differing = text[begin : len(text) - _count_equal(text[begin:][::-1], other[begin:][::-1])]
        if differing not in content or (content.strip() and not differing):
            raise self._cannot_tell(content)
        return begin

    def _find_prompt(self, text: str, prompt: str, question: str, content: str) -> int:
        """The end of the last turn's prompt in the text before its content, which shares only the prompt's end."""
        shared = bisect_left(range(len(prompt)), True, key=lambda size: prompt[len(prompt) - size - 1 :] not in text)
        end = prompt[len(prompt) - shared :]
        if question.strip()[-8:] not in end:
            raise self._cannot_tell(content)
        return text.rindex(end) + shared

    def _count_tokens(self, ids: list[int], text: str, begin: int) -> int:
        """The number of tokens before a character. A token across it counts as after it."""
        before = self._tokenize(text[:begin])
        if ids[: len(before)] == before:
            return len(before)
        if not self._tokenizer.is_fast:
            raise self._cannot_tell(text[begin:])
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return next((at for at, (_, end) in enumerate(offsets["offset_mapping"]) if end > begin), len(ids))

    def _cannot_tell(self, content: str) -> DataError:
        return DataError(
            f"the chat template renders the dialogue so that the tokens of the answer {content!r:.60} cannot be found; "
            "use_chat_template=False uses the simple form"
        )

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                _merged(messages) if self._merge_system else list(messages),  # type: ignore[arg-type]
                tools=self._tools,
                chat_template=None if self.has_template else _SIMPLE_TEMPLATE,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template refuses the dialogue ({reason}){self._advice(messages)}") from error
        return str(text)

    def _tokenize(self, text: str) -> list[int]:
        """Tokenizes as `apply_chat_template`. Too long texts cause no warning, since they are cut later."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _advice(self, messages: Sequence[Message]) -> str:
        if not self._merge_system and _merged(messages) != list(messages):
            merging = DialogueFormat(self._tokenizer, use_chat_template=self._use_chat_template, merge_system=True)
            try:
                merging.prompt(messages)
            except DataError:
                pass  # refused for another reason too
            else:
                return "; merge_system=True (chat: --merge-system) puts the system's text before the first user turn"
        if not self.has_template:
            return ""
        return "; change it, or use the simple form with use_chat_template=False (chat: --no-chat-template)"


def samples(answers: Sequence[Answer]) -> list[tuple[list[int], list[int]]]:
    """Samples (token ids and labels) that train on all answers of a dialogue, each as it was first rendered.

    One sample lasts as long as the template leaves earlier turns unchanged; otherwise a new one begins.
    """
    groups: list[list[Answer]] = []
    for answer in answers:
        if groups and groups[-1][-1].is_within(answer.ids):
            groups[-1].append(answer)
        else:
            groups.append([answer])
    return [_labelled(group[-1].ids, group) for group in groups]


def _labelled(ids: list[int], answers: Sequence[Answer]) -> tuple[list[int], list[int]]:
    labels = [IGNORED] * len(ids)
    for answer in answers:
        labels[answer.start : answer.end] = ids[answer.start : answer.end]
    return ids, labels


def _merged(messages: Sequence[Message]) -> list[Message]:
    match messages:
        case [{"role": "system"} as system, {"role": "user"} as user, *rest]:
            return [Message(role="user", content=f"{system['content']}\n\n{user['content']}"), *rest]
    return list(messages)


def _count_equal(one: str, other: str) -> int:
    """The length of the common start of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
