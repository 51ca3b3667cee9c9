"""Text from tokens, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what tokenizers write for a part of a character


class TextAssembler:
    """The text of a generation, token by token; all pieces together are `tokenizer.decode` of all tokens.

    Holds back what later tokens may still change: a part of a character, and the beginning of a stop text.

    Args:
        tokenizer: of the model; special tokens have no text.
        stop: texts that end the generation. They and what follows them are left out.
        strip: leave out white space at both ends.

    Attributes:
        is_stopped: whether one of `stop` has been found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, strip: bool = False):
        self._tokenizer, self._stop, self._strip = tokenizer, tuple(stop), strip
        self._ids: list[int] = []
        self._begin = self._end = 0  # the tokens of the last text, with which the next are decoded: spaces need context
        self._held = ""
        self._has_begun = self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._ids.append(token)
        before, text = self._decode(self._ids[self._begin : self._end]), self._decode(self._ids[self._begin :])
        if len(text) > len(before) and not text.endswith(_INCOMPLETE):
            self._begin, self._end = self._end, len(self._ids)
            self._held += text[len(before) :]
        return self._take()

    def finish(self) -> str:
        """The rest, when there are no more tokens."""
        if self.is_stopped:
            return ""
        before, text = self._decode(self._ids[self._begin : self._end]), self._decode(self._ids[self._begin :])
        self._held += text[len(before) :]
        return self._take(is_last=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _take(self, *, is_last: bool = False) -> str:
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held, is_last = True, self._held[: min(found)], True
        cut = len(self._held) - (0 if is_last else self._length_of_possible_stop())
        if self._strip:
            cut = len(self._held[:cut].rstrip())
        text, self._held = self._held[:cut], self._held[cut:]
        if self._strip and not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return text

    def _length_of_possible_stop(self) -> int:
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._held))
        ends = (self._held[-length:] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)
