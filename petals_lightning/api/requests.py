"""Requests of OpenAI's API, as they are read. A field that would change the answer and cannot be obeyed is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 128  # of one request
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity",
}  # fmt: skip
"""Fields that change no token."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields that are not supported, and the values that ask for nothing."""


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationFields(BaseModel):
    """What requests of both kinds have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Leaves out fields that ask for nothing. null means that a field was not given."""
        if not isinstance(given, dict):
            return given
        for name, values in _NEUTRAL.items():
            value = given.get(name)
            if value is not None and value not in values:
                raise ValueError(f"{name}={value!r:.40} is not supported here; leave it out")
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in _WITHOUT_EFFECT and name not in _NEUTRAL
        }

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationFields):
    """Of `/v1/chat/completions`. The whole conversation is given each time."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """Of `/v1/completions`. A prompt is a text or a list of token ids; a list of prompts has n choices for each."""

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)


class ModelCard(BaseModel):
    """An entry of `/v1/models`."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "petals-lightning"
    parent: str | None = None
    max_model_len: int
