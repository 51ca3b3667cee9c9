"""Shared by `generate` and `chat`: their options, the model, and text that is shown as it is generated."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from petals_lightning.cli.options import InitialPeers
from petals_lightning.client import ClientConfig
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
    """Which model, in which swarm; for a command that `with_options` decorates."""

    model: Annotated[str, typer.Argument(help="Folder or hub id of the model whose blocks the swarm serves.")]
    initial_peers: InitialPeers = None
    public: Annotated[bool, typer.Option("--public", help="Use the public Petals network.")] = False
    dht_prefix: Annotated[
        str | None, typer.Option(help="Name of the model in the swarm; needed for a local folder.")
    ] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")] = None
    token: Annotated[str | None, typer.Option(help="Hub token for gated models.", envvar="HF_TOKEN")] = None

    def peers(self) -> list[str]:
        """The peers to join. Prints a notice if they are the public network's.

        Raises:
            ConfigurationError: there is no way into a swarm, or two.
        """
        if bool(self.initial_peers) == self.public:
            raise ConfigurationError(
                "give --initial-peers MADDR, the address that `petals-lightning serve` or `bootstrap` printed; "
                "or --public for the public Petals network"
            )
        from petals_lightning.swarm.public import PUBLIC_INITIAL_PEERS, PUBLIC_NOTICE

        if self.public:
            print(f"this is {PUBLIC_NOTICE}", file=sys.stderr)  # a note would be cut
        return self.initial_peers or list(PUBLIC_INITIAL_PEERS)


@dataclass(frozen=True)
class TunedModelOptions(ModelOptions):
    """The same, and what was tuned for the model."""

    prompts: Annotated[str | None, typer.Option(help="Folder or hub id of tuned prompts.", metavar="DIR")] = None
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of LoRA in PEFT's format.", metavar="DIR")] = (
        None
    )
    active_adapter: Annotated[
        str | None, typer.Option(help="Name of LoRA that servers hold, or a folder of it.", metavar="NAME")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Makes random choices repeatable.")] = None


class Terminal(logging.Handler):
    """Writes text to stdout as it is made, and notes to stderr: short, dim, on lines of their own.

    As a handler of log records it notes them: a server that is lost and replaced is one quiet line, not a failure.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(OursOrErrors())
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, style="dim")
        self._is_within_line = False
        self._held: list[str] | None = None

    def read_line(self, prompt: str) -> str:
        """Reads a line of stdin. Notes that come meanwhile follow it, so that they do not disturb the typing."""
        self._held = []
        try:
            return input(prompt)
        finally:
            held, self._held = self._held, None
            for text in held:
                self.note(text)

    def write(self, text: str) -> None:
        print(text, end="", flush=True)
        self._is_within_line = self._is_within_line or bool(text)

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
def load_model(options: TunedModelOptions, client: ClientConfig, terminal: Terminal) -> Iterator[tuple[Any, Any]]:
    """Gives the model and its tokenizer, connected until the end of the `with`; warnings are notes on the terminal.

    Raises:
        PetalsLightningError: an option is wrong, or the swarm cannot be used.
    """
    peers = options.peers()
    logging.basicConfig(handlers=[terminal], force=True)

    from petals_lightning.hf.tokenizer import load_tokenizer
    from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks

    libraries_to_root_log()
    hub: dict[str, Any] = {"revision": options.revision, "token": options.token}
    tokenizer = load_tokenizer(options.model, **hub)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        options.model,
        initial_peers=peers,
        dht_prefix=options.dht_prefix,
        prompts=options.prompts,
        adapter=options.adapter,
        active_adapter=options.active_adapter,
        client_config=client,
        **hub,
    )
    try:
        yield model, tokenizer
    finally:
        blocks = remote_blocks(model)
        assert blocks is not None
        blocks.close()


def sampling_options(temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    """Options of `generate`. Seeds torch.

    Raises:
        ConfigurationError: a value out of range.
    """
    import torch

    from petals_lightning.models import sampling

    if temperature < 0:
        raise ConfigurationError(f"--temperature is {temperature:g}: it must be 0 or more")
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"--top-p is {top_p:g}: it must be above 0 and at most 1")
    if seed is not None:
        torch.manual_seed(seed)
    return sampling.sampling_options(temperature, top_p)


def text_streamer(tokenizer: Any, write: Callable[[str], None], end_ids: Sequence[int] = ()) -> Any:
    """A streamer for `generate` that writes each word once it is complete, without special tokens and `end_ids`."""
    from transformers import TextStreamer

    class Words(TextStreamer):
        def put(self, value: Any) -> None:
            if self.next_tokens_are_prompt or value.item() not in end_ids:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Words(tokenizer, skip_prompt=True, skip_special_tokens=True)
