"""Routes of OpenAI's API: `/v1/models`, `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from petals_lightning.api.errors import ApiError
from petals_lightning.api.generation import (
    End,
    Event,
    GenerationRequest,
    GenerationThreads,
    Piece,
    ServedModel,
    TokenScore,
)
from petals_lightning.api.requests import MOST_CHOICES, ChatRequest, CompletionRequest, GenerationFields, ModelCard
from petals_lightning.data.dialogues import read_dialogue

T = TypeVar("T")

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; answers of a chat end by themselves


class CallerLeft(Exception):
    """Nobody waits for the answer any more."""


class _Chat:
    """The form of answers of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, served: ServedModel):
        self._served = served

    def whole(self, text: str, scores: list[TokenScore] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(scores)}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None}

    def piece(self, text: str, scores: list[TokenScore] | None, offset: int) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self._logprobs(scores)}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, scores: list[TokenScore] | None) -> dict[str, Any] | None:
        if scores is None:
            return None
        content = [
            {
                **self._entry(score.token, score.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._served.text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _Completion:
    """The form of answers of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, served: ServedModel):
        self._served = served

    def whole(self, text: str, scores: list[TokenScore] | None) -> dict[str, Any]:
        return self.piece(text, scores, 0)

    def first(self) -> dict[str, Any] | None:
        return None

    def piece(self, text: str, scores: list[TokenScore] | None, offset: int) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(scores, offset)}

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, scores: list[TokenScore] | None, offset: int) -> dict[str, Any] | None:
        if scores is None:
            return None
        text_of = self._served.text_of
        tokens = [text_of(score.token) for score in scores]
        return {
            "tokens": tokens,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{text_of(token): logprob for token, logprob in score.top} for score in scores],
            "text_offset": [offset + sum(map(len, tokens[:number])) for number in range(len(tokens))],
        }


Form = _Chat | _Completion


class _EventStream(StreamingResponse):
    """Sends events until the last one, or until the caller leaves; then closes what makes them."""

    def __init__(self, events: AsyncIterator[bytes], running: AsyncExitStack):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._running:
            await super().__call__(scope, receive, send)


def routes(models: Mapping[str, ServedModel], threads: GenerationThreads) -> APIRouter:
    """The routes for these models, by name; the first one is the base of the others."""
    router, started = APIRouter(prefix="/v1"), int(time.time())
    base = next(iter(models))
    cards = {
        name: ModelCard(
            id=name, created=started, parent=base if name != base else None, max_model_len=served.max_length
        ).model_dump()
        for name, served in models.items()
    }

    def find(name: str) -> ServedModel:
        if name not in models:
            raise ApiError(
                404, f"the model {name!r} is not here; there are: {', '.join(models)}", param="model",
                code="model_not_found",
            )  # fmt: skip
        return models[name]

    @router.get("/models")
    async def list_models() -> Any:
        return {"object": "list", "data": list(cards.values())}

    @router.get("/models/{name:path}")
    async def show_model(name: str) -> Any:
        find(name)
        return cards[name]

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = find(body.model)
        ids, end_ids = await asyncio.to_thread(_read_conversation, served, body)
        scores = (body.top_logprobs or 0) if body.logprobs else None
        asked = _requests(
            served, body, [ids], body.max_completion_tokens or body.max_tokens, scores,
            end_ids=end_ids, strip=True, is_conversation=True,
        )  # fmt: skip
        return await _answer(request, body, _Chat(served), served, asked, threads)

    @router.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        served = find(body.model)
        prompts = [served.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in body.prompts]
        if not all(prompts):
            raise ApiError(400, "prompt: it is empty, and has no token to continue", param="prompt")
        asked = _requests(
            served, body, prompts, body.max_tokens or _COMPLETION_TOKENS, body.logprobs,
            end_ids=served.end_ids, strip=False, is_conversation=False,
        )  # fmt: skip
        return await _answer(request, body, _Completion(served), served, asked, threads)

    return router


def _read_conversation(served: ServedModel, body: ChatRequest) -> tuple[list[int], list[int]]:
    """Tokens up to the start of the answer, and those that end it."""
    form = served.dialogue_format
    turns = read_dialogue({"messages": body.messages}, "messages")
    return form.prompt(turns), form.ends_of_answers(served.end_ids)


def _requests(
    served: ServedModel,
    body: GenerationFields,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    top_logprobs: int | None,
    *,
    end_ids: list[int],
    strip: bool,
    is_conversation: bool,
) -> list[GenerationRequest]:
    """N requests for each prompt. The first one of each draws with the seed that was given, the next with the next."""
    if len(prompts) * body.n > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts with n={body.n}: at most {MOST_CHOICES} choices", param="n")
    asked = []
    for ids in prompts:
        room = served.max_length - len(ids)
        if room < (max_tokens or 1):
            raise ApiError(
                400,
                f"the request has {len(ids)} tokens and asks for {max_tokens or 1} more; {served.name!r} has room for "
                f"{served.max_length} in all",
                param="messages" if is_conversation else "prompt",
                code="context_length_exceeded",
            )
        asked += [
            GenerationRequest(
                ids=list(ids),
                max_new_tokens=max_tokens or room,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=(body.seed + number) % 2**63 if body.seed is not None else None,
                stop=body.stops,
                end_ids=end_ids,
                strip=strip,
                is_conversation=is_conversation,
                top_logprobs=top_logprobs,
            )
            for number in range(body.n)
        ]
    return asked


async def _answer(
    request: Request,
    body: GenerationFields,
    form: Form,
    served: ServedModel,
    asked: list[GenerationRequest],
    threads: GenerationThreads,
) -> Response:
    """Generates, and answers in one piece or as a stream. A caller who leaves ends the generation."""
    head = {"id": form.prefix + uuid.uuid4().hex, "object": form.kind, "created": int(time.time()), "model": body.model}
    async with AsyncExitStack() as stack:
        queue = await stack.enter_async_context(threads.run(served, asked))
        if not body.stream:
            return JSONResponse(await _unless_left(request, _whole(queue, asked, form, head)))
        # The first event comes before the status is sent: what fails at once is an error, not a broken stream.
        first = await _unless_left(request, queue.get())
        if isinstance(first[1], Exception):
            raise first[1]
        events = _stream(first, queue, asked, form, head | {"object": form.chunk_kind}, body.wants_usage)
        return _EventStream(events, stack.pop_all())


async def _whole(
    queue: asyncio.Queue[tuple[int, Event]], asked: list[GenerationRequest], form: Form, head: dict[str, Any]
) -> dict[str, Any]:
    texts = [""] * len(asked)
    scores: list[list[TokenScore]] = [[] for _ in asked]
    ends: dict[int, End] = {}
    while len(ends) < len(asked):
        number, event = await queue.get()
        match event:
            case Piece():
                texts[number] += event.text
                scores[number] += [event.score] if event.score is not None else []
            case End():
                ends[number] = event
            case _:
                raise event
    choices = [
        {
            "index": number,
            **form.whole(texts[number], scores[number] if request.top_logprobs is not None else None),
            "finish_reason": ends[number].reason,
        }
        for number, request in enumerate(asked)
    ]
    return head | {"choices": choices, "usage": _usage(ends, asked)}


async def _stream(
    first: tuple[int, Event],
    queue: asyncio.Queue[tuple[int, Event]],
    asked: list[GenerationRequest],
    form: Form,
    head: dict[str, Any],
    wants_usage: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events."""
    usage: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(number: int, choice: dict[str, Any], reason: str | None = None) -> bytes:
        return _event(head | {"choices": [{"index": number, **choice, "finish_reason": reason}]} | usage)

    opening = form.first()
    if opening is not None:
        yield b"".join(chunk(number, opening) for number in range(len(asked)))
    ends: dict[int, End] = {}
    offsets = [0] * len(asked)
    number, event = first
    while True:
        match event:
            case Piece():
                scores = [event.score] if event.score is not None else None
                if event.text or scores:
                    yield chunk(number, form.piece(event.text, scores, offsets[number]))
                offsets[number] += len(event.text)
            case End():
                ends[number] = event
                yield chunk(number, form.last(), event.reason)
                if len(ends) == len(asked):
                    break
            case _:
                yield _event(ApiError.of(event).body)
                return
        number, event = await queue.get()
    if wants_usage:
        yield _event(head | {"choices": [], "usage": _usage(ends, asked)})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage(ends: Mapping[int, End], asked: list[GenerationRequest]) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once."""
    prompts = {tuple(request.ids): ends[number] for number, request in enumerate(asked)}
    prompt = sum(end.prompt_tokens for end in prompts.values())
    completion = sum(end.completion_tokens for end in ends.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts.values())},
    }


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises CallerLeft if the caller leaves before it is there."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
