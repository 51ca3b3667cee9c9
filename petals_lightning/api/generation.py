"""Generations of many callers at once, each in a thread and a session of its own.

All of them are Hugging Face's `generate`, so tokens equal those of `petals-lightning generate`.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from petals_lightning.api.sessions import OpenSession, SessionPool
from petals_lightning.api.text import TextAssembler
from petals_lightning.data.dialogue_format import DialogueFormat
from petals_lightning.errors import CacheFullError
from petals_lightning.hf.compat import OwnDraws
from petals_lightning.models.sampling import end_ids, sampling_options


@dataclass(eq=False)
class ServedModel:
    """A model that callers may choose by its name.

    Args:
        name: by which requests choose it.
        model: with a language-model head.
        tokenizer: of the model.
        dialogue_format: how turns become tokens.
        max_length: tokens of a request and its answer, at most.
    """

    name: str
    model: Any
    tokenizer: Any
    dialogue_format: DialogueFormat
    max_length: int
    _texts: dict[int, str] = field(init=False, default_factory=dict)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text: those of the model's generation config."""
        return end_ids(self.model)

    def text_of(self, token: int) -> str:
        """A single token as text, with its space, as it stands inside of a text. Special tokens have their names."""
        if token not in self._texts:
            (anchor, *_) = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            before = self.tokenizer.decode([anchor])
            self._texts[token] = self.tokenizer.decode([anchor, token])[len(before) :]
        return self._texts[token]


@dataclass(frozen=True)
class GenerationRequest:
    """What one continuation is made from.

    Attributes:
        ids: all tokens before it.
        max_new_tokens: tokens at most.
        temperature, top_p: as in `generate`; temperature 0 is greedy.
        seed: of the draws, which equal those of `generate --seed`; None draws by the process's own generator.
        stop: texts that end it.
        end_ids: tokens that end it.
        strip: without white space at its ends.
        is_conversation: reserve room for later turns.
        top_logprobs: for each token, the logarithm of its probability and so many most likely tokens; None: neither.
    """

    ids: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    end_ids: list[int]
    strip: bool
    is_conversation: bool
    top_logprobs: int | None


@dataclass(frozen=True)
class TokenScore:
    """A token, the natural logarithm of its probability (before temperature and top_p), and the most likely tokens."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What one step adds: text, which may be empty, and the token's score if it was asked for."""

    text: str
    score: TokenScore | None = None


@dataclass(frozen=True)
class End:
    """The end of a continuation.

    Attributes:
        reason: "stop": by an end token or a stop text; "length": by the number of tokens.
        prompt_tokens: before it.
        cached_tokens: of these, on the servers already.
        completion_tokens: of it.
    """

    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


Event = Piece | End | Exception


class GenerationThreads:
    """Runs generations in threads.

    Args:
        max_streams: generations at once; others wait for their turn.
        idle_sessions: sessions kept between requests.
        idle_timeout: seconds for which they are kept.
    """

    def __init__(self, *, max_streams: int, idle_sessions: int, idle_timeout: float):
        self._sessions, self._idle_timeout = SessionPool(idle_sessions), idle_timeout
        self._threads = ThreadPoolExecutor(max_streams, thread_name_prefix="generate")
        self._stopping = threading.Event()

    @asynccontextmanager
    async def run(
        self, served: ServedModel, requests: Sequence[GenerationRequest]
    ) -> AsyncIterator[asyncio.Queue[tuple[int, Event]]]:
        """Starts generations, whose events come with the number of their request. Those left at the end are stopped."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        is_left = threading.Event()

        def generate(number: int, request: GenerationRequest) -> None:
            def emit(event: Event) -> None:
                if not is_left.is_set():
                    loop.call_soon_threadsafe(queue.put_nowait, (number, event))

            try:
                emit(self._generate(served, request, emit, lambda: is_left.is_set() or self._stopping.is_set()))
            except Exception as e:  # whoever asked gets it
                emit(e)

        futures = [self._threads.submit(generate, number, request) for number, request in enumerate(requests)]
        try:
            yield queue
        finally:
            is_left.set()
            for future in futures:
                future.cancel()

    async def close_unused(self) -> None:
        """Closes sessions that were idle for too long, again and again."""
        while True:
            await asyncio.sleep(min(self._idle_timeout, 5.0))
            await asyncio.to_thread(self._sessions.close_idle, self._idle_timeout)

    def close(self) -> None:
        """Stops all generations and closes all sessions."""
        self._stopping.set()
        self._threads.shutdown(cancel_futures=True)
        self._sessions.close_idle()

    def _generate(
        self,
        served: ServedModel,
        request: GenerationRequest,
        emit: Callable[[Piece], None],
        is_left: Callable[[], bool],
    ) -> End:
        ids = torch.tensor(request.ids)
        needed = len(ids) + request.max_new_tokens
        room = served.max_length if request.is_conversation else needed
        reader = _Reader(served, request, emit, is_left)
        while True:
            used, known = self._sessions.take(served.model, ids, needed=needed, max_length=room)
            try:
                used.context.run(_continue, used, ids[known:], served, request, reader)
            except CacheFullError:
                used.session.close()
                if reader.count or (not self._sessions.close_idle() and room == needed):
                    raise
                room = needed  # again, with what idle sessions held, and less room for later turns
                continue
            except BaseException:
                used.session.close()
                raise
            if is_left():
                used.session.close()
            else:
                self._sessions.give_back(used)
            return reader.finish(known)


def _continue(
    used: OpenSession, new: torch.Tensor, served: ServedModel, request: GenerationRequest, reader: _Reader
) -> None:
    """Generates after new tokens [T] of a session."""
    with OwnDraws(request.seed) if request.seed is not None else nullcontext():
        served.model.generate(
            new[None],
            max_new_tokens=request.max_new_tokens,
            eos_token_id=request.end_ids or None,
            pad_token_id=served.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([reader]),
            logits_processor=LogitsProcessorList([reader.scores] if request.top_logprobs is not None else []),
            **sampling_options(request.temperature, request.top_p),
        )


class _Scores(LogitsProcessor):
    """Keeps the logarithms of the probabilities [V] of the step that is being made; changes nothing."""

    logprobs: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logprobs = scores[0].float().log_softmax(-1)
        return scores


class _Reader(StoppingCriteria):
    """Reads each token that `generate` makes, and ends the generation at a stop text or when the caller has left."""

    def __init__(
        self,
        served: ServedModel,
        request: GenerationRequest,
        emit: Callable[[Piece], None],
        is_left: Callable[[], bool],
    ):
        self.scores, self.count = _Scores(), 0
        self._request, self._emit, self._is_left = request, emit, is_left
        self._text = TextAssembler(served.tokenizer, request.stop, strip=request.strip)
        self._is_ended = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self.count += 1
        self._is_ended = token in self._request.end_ids
        if not self._is_ended:
            self._emit(Piece(self._text.add(token), self._score(token)))
        return torch.tensor([self._text.is_stopped or self._is_left()], device=input_ids.device)

    def _score(self, token: int) -> TokenScore | None:
        if self._request.top_logprobs is None:
            return None
        logprobs = self.scores.logprobs
        best = logprobs.topk(min(self._request.top_logprobs, len(logprobs)))
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenScore(token, float(logprobs[token]), top)

    def finish(self, cached: int) -> End:
        """Emits what was held back."""
        if rest := self._text.finish():
            self._emit(Piece(rest))
        reason = "stop" if self._is_ended or self._text.is_stopped else "length"
        return End(reason, len(self._request.ids), cached, self.count)
