"""`petals-lightning generate`: one continuation, for scripts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from petals_lightning.cli.options import InitialPeers
from petals_lightning.cli.talking import (
    DhtPrefix,
    Model,
    PromptFiles,
    Revision,
    Seed,
    Temperature,
    Token,
    TopP,
    loaded,
    sampling,
    word_streamer,
)
from petals_lightning.errors import ConfigurationError


def generate(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="What to continue. [default: read from stdin]")] = None,
    initial_peers: InitialPeers = None,
    dht_prefix: DhtPrefix = None,
    prompts: PromptFiles = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Continue TEXT with MODEL; the continuation goes to stdout as it is made."""
    if max_new_tokens < 1:
        raise ConfigurationError(f"--max-new-tokens is {max_new_tokens}: it must be at least 1")
    options = sampling(temperature, top_p, seed)
    text = text if text is not None else sys.stdin.read().rstrip("\n")
    if not text:
        raise ConfigurationError("there is nothing to continue: give TEXT, or text on stdin")
    with loaded(
        model, initial_peers=initial_peers, dht_prefix=dht_prefix, prompts=prompts, revision=revision, token=token
    ) as (network, tokenizer):

        def write(words: str) -> None:
            print(words, end="", flush=True)

        encoded = tokenizer(text, return_tensors="pt")
        network.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=word_streamer(tokenizer, write),
            **options,
        )
        print(flush=True)
