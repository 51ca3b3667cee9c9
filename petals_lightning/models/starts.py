"""First values of prompts: random, tokens drawn from the vocabulary, or the tokens of a text; of a prefix also zero.

Deep prompts start at zero with each of them. They are added to the hidden states that the frozen model computes at the
prefix's positions. If the input prompts are the embeddings of a text, these are the hidden states of that text, so that
zero is the start from the model's own pass over it; any other value would move away from it.

A prefix starts from the keys and values that the frozen model makes of such tokens, so it does what they do in front of
a sample. Its random values are PEFT's, N(0, 1).

Shapes: P virtual tokens, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, get_args

import torch
from torch import nn

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf import Checkpoint
from petals_lightning.models.prompts import Prompts

PromptInit = Literal["random", "vocabulary", "text", "zero"]
PROMPT_INITS: tuple[PromptInit, ...] = get_args(PromptInit)

_SAMPLED_TOKENS = 4096  # enough to estimate how far embeddings spread


@dataclass(frozen=True)
class PromptStart:
    """First values of prompts.

    Attributes:
        init: "random" (normally distributed, as long as embeddings of tokens), "vocabulary" (the embeddings of tokens
            that are drawn), "text", or "zero", which is for a prefix.
        tokens: with "text", its P tokens.
    """

    init: PromptInit = "random"
    tokens: tuple[int, ...] = ()

    @classmethod
    def read(cls, init: PromptInit, text: str | None, pre_seq_len: int | None, checkpoint: Checkpoint) -> PromptStart:
        """The start with a text's tokens: cut off after P, or repeated up to P, as PEFT's `PromptTuningInit.TEXT` does.

        Raises:
            ConfigurationError: the text has no tokens.
            CheckpointError: the model has no tokenizer.
        """
        if init != "text" or pre_seq_len is None:
            return cls(init)
        assert text is not None, "checked by check_start"
        tokens = checkpoint.tokenizer()(text)["input_ids"]
        if not tokens:
            raise ConfigurationError(f"prompt_init_text={text!r}: it has no tokens; give words, e.g. 'Good or bad?'")
        return cls(init, tuple(islice(cycle(tokens), pre_seq_len)))

    @torch.no_grad()
    def values(self, embeddings: nn.Module, pre_seq_len: int) -> torch.Tensor:
        """[P, E] float32, drawn from torch's global generator.

        They are outputs of the embeddings' module, whose weights some families scale (Gemma 3).

        Raises:
            ConfigurationError: the model has no embedding for a token of the text.
        """
        weight = next(embeddings.parameters())
        known = weight.shape[0]
        if self.init == "random":
            sampled = torch.linspace(0, known - 1, min(known, _SAMPLED_TOKENS)).long()
            embedded = embeddings(sampled.to(weight.device)).float()
            return embedded.new_empty(pre_seq_len, embedded.shape[1]).normal_(0.0, embedded.std().item())
        if self.init == "text" and max(self.tokens) >= known:
            raise ConfigurationError(
                f"prompt_init_text has the token {max(self.tokens)}, the model has embeddings for 0…{known - 1}: "
                "use words without the tokenizer's added tokens"
            )
        tokens = torch.tensor(self.tokens) if self.init == "text" else torch.randint(known, (pre_seq_len,))
        return embeddings(tokens.to(weight.device)).float()


def start_prompts(prompts: Prompts, start: PromptStart, embeddings: nn.Module) -> torch.Tensor | None:
    """Gives prompts their first values, drawn from torch's global generator.

    Returns:
        For a prefix that starts from tokens: their embeddings [P, E], of which the model's own pass makes its keys and
        values. None: nothing is left to do.
    """
    if prompts.past is None:
        prompts.reset_parameters(start.values(embeddings, prompts.pre_seq_len))
        return None
    if start.init == "zero":
        return None
    if start.init == "random":
        prompts.set_flat_past(torch.empty_like(prompts.flat_past()).normal_())
        return None
    return start.values(embeddings, prompts.pre_seq_len)


def check_start(init: Any, text: str | None, tuning_mode: str | None, *, loads_prompts: bool = False) -> None:
    """Raises ConfigurationError for an unknown start, a text that is missing or not used, or a start that is not used.

    Args:
        tuning_mode: of the model.
        loads_prompts: whether the prompts get values that were tuned before.
    """
    if init not in PROMPT_INITS:
        raise ConfigurationError(f"prompt_init={init}: must be one of {', '.join(PROMPT_INITS)}")
    if init == "text" and not text:
        raise ConfigurationError("prompt_init=text needs a text: set prompt_init_text, e.g. 'Good or bad?'")
    if init != "text" and text:
        raise ConfigurationError(f"prompt_init_text={text!r} is not used with prompt_init={init}: set prompt_init=text")
    if init == "zero" and tuning_mode != "prefix":
        raise ConfigurationError(
            f"prompt_init=zero is a start of tuning_mode='prefix', and it is {tuning_mode!r}: take another one, e.g. "
            "vocabulary"
        )
    if loads_prompts and init != "random":
        raise ConfigurationError(f"prompt_init={init}: saved prompts are loaded, which replace any start; leave it off")
