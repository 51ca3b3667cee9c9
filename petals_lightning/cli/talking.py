"""What `generate` and `chat` share: their options, the model, and text that appears as it is made."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from petals_lightning.cli.options import IdentityPath, InitialPeers
from petals_lightning.errors import ConfigurationError

Temperature = Annotated[float, typer.Option(help="Randomness of the choice of words; 0 always takes the likeliest.")]
TopP = Annotated[float, typer.Option(help="Choose among the likeliest words that make up this share.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which swarm; a command's first parameter, see `takes_model_options`."""

    model: Annotated[str, typer.Argument(help="Folder or hub id of the model whose blocks the swarm serves.")]
    initial_peers: InitialPeers = None
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name of the model in the swarm; needed for a local folder.")
    ] = None
    prompts: Annotated[str | None, typer.Option(help="Folder or hub id of tuned prompts.", metavar="DIR")] = None
    seed: Annotated[int | None, typer.Option(help="Makes random choices repeatable.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None
    token: Annotated[str | None, typer.Option(help="Hub token for gated models.", envvar="HF_TOKEN")] = None
    token_file: Annotated[
        str | None, typer.Option(help="File of the token of a private swarm, as its servers have it.", metavar="FILE")
    ] = None
    identity_path: IdentityPath = None


def takes_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that wants a `ModelOptions` first the options of its fields, before its own."""
    shared = inspect.signature(ModelOptions, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @wraps(command)
    def flat(**given: Any) -> None:
        command(ModelOptions(**{name: given.pop(name) for name in shared}), **given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own)]
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


@contextmanager
def loaded(options: ModelOptions) -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer, connected until the end of the `with`.

    Raises:
        PetalsLightningError: an option is wrong, or the swarm cannot be used.
    """
    if not options.initial_peers:
        raise ConfigurationError(
            "give --initial-peers MADDR: the address that `petals-lightning serve` or `bootstrap` printed"
        )
    # A server that is lost and replaced is one quiet line, not a failure.
    logging.basicConfig(level=logging.WARNING, format="(%(message)s)", force=True)

    from petals_lightning.data.tokenizers import load_tokenizer
    from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
    from petals_lightning.protocol.auth import read_token

    hub: dict[str, Any] = {"revision": options.revision, "token": options.token}
    tokenizer = load_tokenizer(options.model, **hub)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model,
        initial_peers=options.initial_peers,
        dht_prefix=options.dht_prefix,
        prompts=options.prompts,
        swarm_token=read_token(options.token_file) if options.token_file is not None else None,
        identity_path=options.identity_path,
        **hub,
    )
    try:
        yield model, tokenizer
    finally:
        blocks = remote_blocks(model)
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
