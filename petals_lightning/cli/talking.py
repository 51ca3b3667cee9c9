"""What `generate` and `chat` share: their options, the model, and text that appears as it is made."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console

from petals_lightning.cli.options import IdentityPath, InitialPeers
from petals_lightning.errors import ConfigurationError
from petals_lightning.library_messages import OursOrErrors, libraries_to_root_log

Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[
    float, typer.Option(help="Nucleus sampling: keep the smallest set of tokens with this total probability.")
]

_NOTE_LENGTH = 90  # characters, with brackets on a line of most terminals
_PEER_ID = re.compile(r"\b(12D3Koo|Qm)\w{30,}")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, in which swarm; a command's first parameter, see `takes_model_options`."""

    model: Annotated[str, typer.Argument(help="Folder or hub id of the model whose blocks the swarm serves.")]
    initial_peers: InitialPeers = None
    public: Annotated[bool, typer.Option("--public", help="Use the public Petals network.")] = False
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


class Screen(logging.Handler):
    """Words on stdout as they are made; what there is to note on stderr, short and dim, on lines of its own.

    As a handler of log records it notes them: a server that is lost and replaced is one quiet line, not a failure.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(OursOrErrors())
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, style="dim")
        self._is_within_line = False
        self._held: list[str] | None = None

    def read_line(self, prompt: str) -> str:
        """A line of stdin. What is to be noted meanwhile follows it, so that it does not disturb who is typing."""
        self._held = []
        try:
            return input(prompt)
        finally:
            held, self._held = self._held, None
            for text in held:
                self.note(text)

    def write(self, words: str) -> None:
        print(words, end="", flush=True)
        self._is_within_line = self._is_within_line or bool(words)

    def end_line(self) -> None:
        print(flush=True)
        self._is_within_line = False

    def note(self, text: str) -> None:
        if self._is_within_line and sys.stdout.isatty():
            self.end_line()
        self._console.print(text)

    def emit(self, record: logging.LogRecord) -> None:
        text = _PEER_ID.sub(lambda found: f"…{found[0][-6:]}", record.getMessage())
        text = f"({textwrap.shorten(text, _NOTE_LENGTH, placeholder=' …')})"
        if self._held is not None:
            self._held.append(text)
        else:
            self.note(text)


@contextmanager
def loaded(options: ModelOptions, screen: Screen) -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer, connected until the end of the `with`; warnings are notes on the screen.

    Raises:
        PetalsLightningError: an option is wrong, or the swarm cannot be used.
    """
    if bool(options.initial_peers) == options.public:
        raise ConfigurationError(
            "give --initial-peers MADDR, the address that `petals-lightning serve` or `bootstrap` printed; "
            "or --public for the public Petals network"
        )
    logging.basicConfig(handlers=[screen], force=True)

    from petals_lightning.swarm.public import PUBLIC_INITIAL_PEERS, PUBLIC_NOTICE

    if options.public:
        print(f"this is {PUBLIC_NOTICE}", file=sys.stderr)  # a note on the screen would be cut
    from petals_lightning.data.tokenizers import load_tokenizer
    from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
    from petals_lightning.protocol.auth import read_token

    libraries_to_root_log()
    hub: dict[str, Any] = {"revision": options.revision, "token": options.token}
    tokenizer = load_tokenizer(options.model, **hub)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model,
        initial_peers=options.initial_peers or PUBLIC_INITIAL_PEERS,
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


def word_streamer(tokenizer: Any, write: Callable[[str], None], end_ids: Sequence[int] = ()) -> Any:
    """A streamer for `generate` that hands on words as soon as they are complete, without special tokens and ends."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or value.item() not in end_ids:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)
