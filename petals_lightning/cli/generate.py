"""`petals-lightning generate`: one continuation, for scripts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from petals_lightning.cli.generation import (
    Temperature,
    Terminal,
    TopP,
    TunedModelOptions,
    load_model,
    sampling_options,
    text_streamer,
)
from petals_lightning.cli.options import with_options
from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError


@with_options
def generate(
    options: TunedModelOptions,
    client: ClientConfig,
    text: Annotated[str | None, typer.Argument(help="Text to continue.", show_default="read from stdin")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
) -> None:
    """Continue TEXT with MODEL; the continuation goes to stdout as it is made."""
    if max_new_tokens < 1:
        raise ConfigurationError(f"--max-new-tokens is {max_new_tokens}: it must be at least 1")
    choices = sampling_options(temperature, top_p, options.seed)
    text = text if text is not None else sys.stdin.read().rstrip("\n")
    if not text:
        raise ConfigurationError("there is nothing to continue: give TEXT, or text on stdin")
    terminal = Terminal()
    with load_model(options, client, terminal) as (network, tokenizer):
        encoded = tokenizer(text, return_tensors="pt")
        network.generate(
            encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=text_streamer(tokenizer, terminal.write),
            **choices,
        )
        terminal.end_line()
