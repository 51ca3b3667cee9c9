"""Hugging Face's own `generate`, with keys and values on servers.

Shapes: B batch, T tokens of a conversation, S new tokens.

A batch of conversations continues together: where some samples end a turn earlier, padding follows and is masked out.
Beams, and several return sequences of a sample, widen the batch during the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
from transformers import GenerationConfig

from petals_lightning.client.inference_session import InferenceSession
from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf.compat import CacheFromOutside, pop_cache
from petals_lightning.models.bridge import DecoderBridge
from petals_lightning.models.remote_cache import RemoteCache


class GenerationSession:
    """A conversation, or a batch of them. `generate` calls inside its `with` continue it.

    Attributes:
        tokens: [B, T] all tokens so far, given and generated; None before the first call.
        attention_mask: [B, T], 0 where a token is padding.
        beams, eos_tokens: of the running call: the number of beams, and the tokens that end a turn, or None.
        cache: for callers that run the model themselves: its `cache` (`past_key_values` before transformers 5.24).
    """

    def __init__(self, bridge: DecoderBridge, session: InferenceSession):
        self._bridge, self._session = bridge, session
        self.cache = RemoteCache(session)
        self.tokens: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.beams = 1
        self.eos_tokens: torch.Tensor | None = None
        self._rows = 1  # of each sample, in the running call's batch

    @property
    def max_length(self) -> int:
        """Tokens for which servers have reserved memory."""
        return self._session.max_length

    @property
    def peers(self) -> list[str]:
        """Peer ids of the servers that run the session, in the order of blocks."""
        return self._session.peers

    @property
    def position(self) -> int:
        """Tokens whose keys and values are on servers: all but the last generated one, which no step has read yet.

        Set it to go back, to any number up to that of `tokens`: later tokens are dropped.
        """
        return self._session.position

    @position.setter
    def position(self, value: int) -> None:
        known = max(self._session.position, self.tokens.shape[1] if self.tokens is not None else 0)
        if not 0 <= value <= known:
            raise UnsupportedInputError(
                f"position {value}: this session knows {known} tokens and can go back to 0…{known}"
            )
        self._session.position = min(value, self._session.position)
        if self.tokens is not None and self.attention_mask is not None:
            self.tokens, self.attention_mask = self.tokens[:, :value], self.attention_mask[:, :value]

    def continued(
        self, inputs: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens followed by new ones [B, S], and their mask. At least one token is not on servers yet.

        Raises:
            UnsupportedInputError: there is nothing to continue, or the new inputs have another batch size.
        """
        self.beams = self._rows = 1
        if inputs is None and self.tokens is None:
            raise UnsupportedInputError("the first generate of a session needs input_ids")
        if self.tokens is None or self.attention_mask is None or self.tokens.shape[1] == 0:
            assert inputs is not None
            tokens, mask = inputs, attention_mask if attention_mask is not None else torch.ones_like(inputs)
        else:
            new = inputs if inputs is not None else self.tokens[:, :0]
            if len(self.tokens) != len(new):
                raise UnsupportedInputError(
                    f"the session has {len(self.tokens)} samples, new inputs have {len(new)}: give one for each, or "
                    "keep some of the session's with session.select([0, …])"
                )
            new_mask = attention_mask if attention_mask is not None else torch.ones_like(new)
            tokens = torch.cat([self.tokens.to(new.device), new], dim=1)
            mask = torch.cat([self.attention_mask.to(new.device), new_mask.to(new.dtype)], dim=1)
        self._session.position = min(self._session.position, tokens.shape[1] - 1)
        return tokens, mask

    def select(self, samples: Sequence[int]) -> None:
        """Keeps only these samples of the conversation, by number, e.g. one of several return sequences.

        Raises:
            UnsupportedInputError: there is no such sample.
        """
        known = len(self.tokens) if self.tokens is not None else 0
        if not samples or not all(0 <= sample < known for sample in samples):
            raise UnsupportedInputError(f"samples {list(samples)}: this session has {known}, counted from 0")
        assert self.tokens is not None
        assert self.attention_mask is not None
        rows = torch.tensor(samples)
        self._session.select(rows)
        self.tokens, self.attention_mask = self.tokens[rows], self.attention_mask[rows]

    def widen(self, rows: int) -> None:
        """Repeats each sample `rows` times in the batch of the running call."""
        self._rows = rows
        if rows > 1 and self._session.position > 0:
            assert self.tokens is not None
            self._session.select(torch.arange(len(self.tokens)).repeat_interleave(rows))

    def narrow(self, rows: int, samples: int, position: int) -> None:
        """Goes back to a position up to which a sample's rows are equal, and to `rows` rows per sample."""
        self._session.position = min(position, self._session.position)
        if self._session.position > 0 and rows != self._rows:
            self._session.select((torch.arange(samples) * self._rows).repeat_interleave(rows))
        self._rows = rows

    def keep(self, sequences: torch.Tensor, mask: torch.Tensor) -> None:
        """Adds the result [B, T + S] of a call to the conversation, whose earlier tokens had this mask [b, T]."""
        past, rows = mask.shape[1], len(sequences) // len(mask)
        new_mask = torch.ones_like(sequences[:, past:])
        if self.eos_tokens is not None:
            ended = torch.isin(sequences[:, past:], self.eos_tokens.to(sequences.device)).cumsum(1)
            new_mask[:, 1:] = ended[:, :-1] == 0  # padding follows the first end
        self.tokens = sequences
        self.attention_mask = torch.cat([mask.repeat_interleave(rows, 0), new_mask.to(mask.dtype)], dim=1)

    def close(self) -> None:
        """Frees the servers' memory."""
        self._session.close()

    def __enter__(self) -> Self:
        if _conversation(self._bridge) is not None:
            raise UnsupportedInputError("the model is inside another inference session: leave that one first")
        _conversations.set((*_conversations.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _conversations.set(tuple(other for other in _conversations.get() if other is not self))
        self.close()


_conversations: ContextVar[tuple[GenerationSession, ...]] = ContextVar("conversations", default=())
"""The sessions of all models whose `with` encloses the running code."""


def _conversation(bridge: DecoderBridge) -> GenerationSession | None:
    return next((session for session in _conversations.get() if session._bridge is bridge), None)


class RemoteGeneration(CacheFromOutside):
    """Mixin for a family's class with a language-model head: `generate` and sessions."""

    bridge: DecoderBridge

    def inference_session(self, *, max_length: int) -> GenerationSession:
        """A conversation of up to `max_length` tokens (without a tuned model's prompts), for a `with` statement.

        Servers reserve memory for all of it at the first step, or refuse (CacheFullError). The memory is freed at the
        end of the `with`. Later `generate` calls take new tokens only, and return them with what was generated.

        Each thread and each asyncio task has its own conversations. To continue this one in another thread, as with a
        streamer, start it inside the `with` by `Thread(target=contextvars.copy_context().run, args=[…])`.
        """
        return GenerationSession(self.bridge, self.bridge.open_session(max_length))

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Outside of a session, it opens one for its own length.

        Inside `inference_session`, the conversation continues: `inputs` [B, S] are the new tokens only (padded on the
        left, with their `attention_mask`), and the returned sequences begin with them. With `num_return_sequences` n it
        continues as B·n conversations; `session.select` keeps some of them.

        Raises:
            UnsupportedInputError: an argument cannot be combined with a session.
            SwarmError: servers failed beyond what retries can mend.
        """
        session = _conversation(self.bridge)
        if session is None:
            try:
                return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            finally:
                self.bridge.close_own_session()
        if kwargs.get("inputs_embeds") is not None or pop_cache(dict(kwargs)) is not None:
            raise UnsupportedInputError("inside an inference session give input_ids, not embeddings or a cache")
        inputs = kwargs.pop("input_ids", inputs)
        past = session.tokens.shape[1] if session.tokens is not None else 0
        before = session.position
        tokens, mask = session.continued(inputs, kwargs.pop("attention_mask", None))
        try:
            output = super().generate(tokens, *args, attention_mask=mask, **kwargs)  # type: ignore[misc]
        except BaseException:
            session.narrow(1, len(tokens), before)  # drop tokens that were never returned
            raise
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if session.beams > 1:  # the best beam is not what servers hold last
            session.narrow(len(sequences) // len(tokens), len(tokens), tokens.shape[1])
        session.keep(sequences, mask)
        if isinstance(output, torch.Tensor):
            return sequences[:, past:]
        output.sequences = sequences[:, past:]
        return output

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the family's method. Where that drops the cache (Phi-3, whose rotary factors change), servers do too."""
        name = self.bridge.cache_name
        cache = kwargs.get(name)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if isinstance(cache, RemoteCache) and inputs.get(name) is None:
            cache.session.position = 0
            inputs[name] = cache
        return inputs

    def make_cache(self, generation_config: GenerationConfig, max_length: int) -> RemoteCache:
        session = _conversation(self.bridge)
        if session is None:
            return RemoteCache(self.bridge.own_session(max_length))
        eos = generation_config.eos_token_id
        session.eos_tokens = torch.as_tensor(eos).reshape(-1) if eos is not None else None
        session.beams = generation_config.num_beams
        session.widen(max(generation_config.num_beams, generation_config.num_return_sequences))
        return session.cache
