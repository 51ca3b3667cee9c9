"""What `generate` and `chat` share: their options, the model, and text that appears as it is made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from petals_lightning.errors import ConfigurationError

Model = Annotated[str, typer.Argument(help="Folder or hub id of the model whose blocks the swarm serves.")]
DhtPrefix = Annotated[str | None, typer.Option(help="Name of the model in the swarm; needed for a local folder.")]
PromptFiles = Annotated[str | None, typer.Option("--prompts", help="Folder or hub id of tuned prompts.", metavar="DIR")]
Temperature = Annotated[float, typer.Option(help="Randomness of the choice of words; 0 always takes the likeliest.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest words that make up this share.")]
Seed = Annotated[int | None, typer.Option(help="Makes random choices repeatable.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
Token = Annotated[str | None, typer.Option(help="Hub token for gated models.", envvar="HF_TOKEN")]


@contextmanager
def loaded(
    model: str,
    *,
    initial_peers: list[str] | None,
    dht_prefix: str | None,
    prompts: str | None,
    revision: str | None,
    token: str | None,
) -> Any:
    """The model and its tokenizer, connected until the end of the `with`.

    Raises:
        PetalsLightningError: an option is wrong, or the swarm cannot be used.
    """
    if not initial_peers:
        raise ConfigurationError(
            "give --initial-peers MADDR: the address that `petals-lightning serve` or `bootstrap` printed"
        )
    # A server that is lost and replaced is one quiet line, not a failure.
    logging.basicConfig(level=logging.WARNING, format="(%(message)s)", force=True)

    from petals_lightning.data.tokenizers import load_tokenizer
    from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks

    tokenizer = load_tokenizer(model, revision=revision, token=token)
    loaded_model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=initial_peers, dht_prefix=dht_prefix, prompts=prompts, revision=revision, token=token
    )
    try:
        yield loaded_model, tokenizer
    finally:
        blocks = remote_blocks(loaded_model)
        assert blocks is not None
        blocks.close()


def sampling(temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """Options of `generate`; seeds torch.

    Raises:
        ConfigurationError: a value out of range.
    """
    import torch

    if temperature < 0:
        raise ConfigurationError(f"--temperature is {temperature:g}: it must be 0 or more")
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"--top-p is {top_p:g}: it must be above 0 and at most 1")
    if seed is not None:
        torch.manual_seed(seed)
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def word_streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """A streamer for `generate` that hands on words as soon as they are complete."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)
