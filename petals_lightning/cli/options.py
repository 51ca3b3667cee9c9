"""Options that several commands share, flags for dataclasses of options, log lines, and signals."""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from petals_lightning.errors import ConfigurationError
from petals_lightning.library_messages import OursOrErrors
from petals_lightning.options import Option, make, options_of

_MADDR = "MADDR"
_IS_MADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr|p2p)/")

InitialPeers = Annotated[
    list[str] | None, typer.Option(help="Multiaddresses of one or more peers to join.", metavar=_MADDR)
]
HostMaddrs = Annotated[list[str], typer.Option(help="Addresses to listen on.", metavar=_MADDR)]
AnnounceMaddrs = Annotated[
    list[str] | None,
    typer.Option(help="Addresses to announce instead of these (NAT, containers).", metavar=_MADDR),
]
IdentityPath = Annotated[
    str | None, typer.Option(help="File of the private key, made if missing; keeps the peer id the same.")
]
LogFormat = Annotated[
    str, typer.Option(help="Lines on stderr: text for people, or json, an object on each line, for programs.")
]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: a command's parameters that are dataclasses become flags, one for each of their fields.

    Fields made by `option` become flags that follow those of the command itself, in panels of their own; others are
    typer's own parameters. The command is called with instances of the dataclasses.
    """
    own, declared = [], []
    configs: dict[str, tuple[Any, dict[str, Option]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if not is_dataclass(parameter.annotation):
            own.append(parameter)
            continue
        kind: Any = parameter.annotation
        options = {each.name: each for each in options_of(kind)}
        configs[name] = kind, options
        own += [each for key, each in inspect.signature(kind, eval_str=True).parameters.items() if key not in options]
        declared += [_parameter(each) for each in options.values() if not each.secret]

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, (kind, options) in configs.items():
            values = {each.name: given.pop(each.name) for each in fields(kind) if each.name in given}
            read = {key: _value(each, values[key]) for key, each in options.items() if key in values}
            given[name] = make(kind, values | read)
        command(**given)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *declared)]
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


def _parameter(option: Option) -> inspect.Parameter:
    """The parameter of a command that typer makes an option's flag of."""
    default = option.default / option.unit if option.unit != 1 and option.default is not None else option.default
    kind: Any = str if option.parse is not None else float if option.unit != 1 else option.kind
    if option.is_list:
        kind, default = list[str], None
    names = (option.flag, *((f"--no-{option.flag[2:]}",) if default is True else ()))
    flag = typer.Option(
        "/".join(names),
        help=option.meaning,
        metavar=option.metavar,
        show_default=option.default_words or default is not None,
        rich_help_panel=option.group,
    )
    hint: Any = Annotated[kind | None if default is None else kind, flag]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _value(option: Option, given: Any) -> Any:
    """Returns the value of an option, checked and converted from that of its flag."""
    option.check(given, option.flag)
    if given is None or given == []:
        return None
    if option.parse is not None:
        return option.parse(given)
    return int(given * option.unit) if option.unit != 1 else given


class MaddrCommand(TyperCommand):
    """A command whose options for multiaddresses take several; typer's own options take one each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for each in self.params if getattr(each, "metavar", None) == _MADDR for name in each.opts}
        return super().parse_args(ctx, list(_one_address_each(args, names)))


def _one_address_each(words: Iterable[str], options: set[str]) -> Iterator[str]:
    """Repeats an option before each further address that follows it on the command line."""
    rest, option = iter(words), None
    for word in rest:
        if word in options:
            option = word
            yield from (word, *(value for value in [next(rest, None)] if value is not None))
        elif option is not None and _IS_MADDR.match(word):
            yield from (option, word)
        else:
            name, _, _ = word.partition("=")
            option = name if name in options else None
            yield word
        if word == "--":
            yield from rest


def configure_logging(with_libraries: bool = False, form: str = "text") -> None:
    """Logs on stderr: our lines, and with `with_libraries` those of other libraries too.

    Args:
        with_libraries: see above.
        form: "text": a line with a time for people; "json": an object on each line, for programs.

    Raises:
        ConfigurationError: another form.
    """
    if form not in ("text", "json"):
        raise ConfigurationError(f"--log-format is {form!r}: choose text or json")
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if not with_libraries:
        handler.addFilter(OursOrErrors())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _JsonLines(logging.Formatter):
    """A JSON object on each line: time (ISO 8601, UTC), level, logger, message, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def say(line: str) -> None:
    """Prints a line and flushes it: scripts and parent processes read these lines."""
    print(line, flush=True)


class StopSignal:
    """Turns SIGINT and SIGTERM into an event. The first asks the program to shut down, a second one interrupts it."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        atexit.register(self._ignore)  # at that point an interrupt could only print a traceback

    @staticmethod
    def _ignore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def wait_while(self, alive: Callable[[], bool]) -> bool:
        """Waits for a signal. Returns False if `alive` returned False before one came."""
        while not self._event.wait(1.0):  # short waits: a signal handler runs between them
            if not alive():
                return False
        return True

    def _on_signal(self, number: int, frame: object) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
