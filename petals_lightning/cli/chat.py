"""`petals-lightning chat`: a conversation in the terminal, or over pipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from petals_lightning.errors import ConfigurationError, PetalsLightningError

if TYPE_CHECKING:
    from petals_lightning.cli.conversation import Conversation

_HELP = """/undo         take your last message and its answer back
/reset        start again
/save FILE    append the conversation to a jsonl file, from which a model can be tuned
/help         this
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


@with_options
def chat(
    options: TunedModelOptions,
    client: ClientConfig,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the conversation at most.", show_default="2048, or the model's limit"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    chat_template: Annotated[
        bool, typer.Option(help="Use the tokenizer's chat template, as tuning did; else the simple form User: …")
    ] = True,
    merge_system: Annotated[
        bool, typer.Option("--merge-system", help="Put the --system text before the first message.")
    ] = False,
) -> None:
    """Talk to MODEL. Lines on stdin are messages, answers go to stdout; /help lists commands."""
    for name, value in (("--max-length", max_length), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}: it must be at least 1")
    choices = sampling_options(temperature, top_p, options.seed)
    terminal, is_interactive = Terminal(), sys.stdin.isatty()
    if is_interactive:
        terminal.note("joining the swarm…")
    with load_model(options, client, terminal) as (network, tokenizer):
        from petals_lightning.cli.conversation import Conversation
        from petals_lightning.data.dialogue_format import DialogueFormat
        from petals_lightning.models import remote_blocks
        from petals_lightning.models.sampling import longest_text

        with network.inference_session(max_length=max_length or min(longest_text(network), 2048)) as session:
            form = DialogueFormat(tokenizer, use_chat_template=chat_template, merge_system=merge_system)
            conversation = Conversation(
                network, form, session, system=system, max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id, **choices,
            )  # fmt: skip
            if is_interactive:
                blocks = remote_blocks(network)
                assert blocks is not None
                servers = len({span.peer_id for span in blocks.route()})
                terminal.note(f"{len(blocks)} blocks on {servers} server{'s' * (servers != 1)}; /help lists commands")
                ends = [tokenizer.convert_ids_to_tokens(end) or str(end) for end in conversation.end_ids]
                terminal.note(f"an answer ends with {', '.join(ends) or 'nothing but --max-new-tokens'}")
            ChatLoop(conversation, tokenizer, terminal, is_interactive).run()


class ChatLoop:
    """Reads messages and commands, shows answers word by word. Shows only answers if stdin is not a terminal."""

    def __init__(self, conversation: Conversation, tokenizer: Any, terminal: Terminal, is_interactive: bool):
        self._conversation, self._tokenizer, self._terminal = conversation, tokenizer, terminal
        self._is_interactive = is_interactive

    def run(self) -> None:
        if self._is_interactive:
            with suppress(ImportError):  # not on every platform; without it the line has no history
                import readline  # noqa: F401
        for line in self._lines():
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield self._terminal.read_line("> " if self._is_interactive else "").strip()
            except EOFError:
                if self._is_interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                print()
                self._terminal.note("/exit or Ctrl-D leaves")

    def _command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        match command:
            case "/undo":
                self._terminal.note("taken back" if self._conversation.undo() else "there is nothing to take back")
            case "/reset":
                self._conversation.reset()
                self._terminal.note("the conversation starts anew")
            case "/save" if argument:
                try:
                    self._conversation.save(Path(argument.strip()))
                    self._terminal.note(f"saved to {argument.strip()}")
                except OSError as e:
                    self._terminal.note(f"not saved: {e}")
            case _:
                self._terminal.note(_HELP)

    def _answer(self, text: str) -> None:
        started = False

        def write(piece: str) -> None:
            nonlocal started
            piece = piece if started else piece.lstrip()
            started = started or bool(piece)
            self._terminal.write(piece)

        began = time.perf_counter()
        try:
            _, count = self._conversation.reply(text, text_streamer(self._tokenizer, write, self._conversation.end_ids))
        except KeyboardInterrupt:
            self._terminal.note("stopped; this message and its answer are left out of the conversation")
            return
        except PetalsLightningError as e:
            if not self._is_interactive:
                raise
            self._terminal.note(f"error: {e}")
            return
        self._terminal.end_line()
        if self._is_interactive:
            self._terminal.note(f"{count} tokens, {count / (time.perf_counter() - began):.1f} tokens/s")
