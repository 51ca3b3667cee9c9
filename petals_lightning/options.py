"""Options of clients and servers. Each is declared once, as a field of a dataclass; every surface follows from it.

`option` makes such a field, with its meaning and its bounds. Keyword arguments, Hydra's schema, the command line and
docs/options.md are derived from these fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from petals_lightning.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A condition on the values of an option, and its text in errors."""

    holds: Callable[[Any], bool]
    words: str


ABOVE_0 = Rule(lambda value: value > 0, "it must be above 0")
FINITE_ABOVE_0 = Rule(lambda value: 0 < value < math.inf, "it must be above 0")
FROM_0 = Rule(lambda value: value >= 0, "it must be 0 or more")
FINITE_FROM_0 = Rule(lambda value: 0 <= value < math.inf, "it must be 0 or more")
SHARE = Rule(lambda value: 0 <= value <= 1, "it is a share, from 0 to 1")


@dataclass(frozen=True)
class Option:
    """One option: the field of a dataclass, and the arguments of `option`."""

    name: str
    kind: Any
    """Its type without None, e.g. `float` or `tuple[str, ...]`."""
    default: Any
    takes_none: bool
    """Whether None is a value."""
    meaning: str
    group: str
    """The first sentence about the dataclass that declares it."""
    rule: Rule | None = None
    secret: bool = False
    """Whether only Python code gives it: the value must not reach a command line, a configuration file or a log."""
    flag: str = ""
    """The name on the command line, e.g. `--audit-rate`."""
    metavar: str | None = None
    default_words: str | None = None
    """Describes a default of None in help texts."""
    parse: Callable[[str], Any] | None = None
    """Converts the text of a command line, for values that are not numbers, words or lists of words."""
    unit: int = 1
    """Bytes in one unit on the command line, e.g. 2**30 where it counts in GiB."""

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of words."""
        return get_args(self.kind)[1:] == (...,)

    def check(self, value: Any, called: str) -> None:
        """Raises ConfigurationError, which calls the option `called`, if the value is out of bounds."""
        if self.rule is None or (value is None and self.takes_none):
            return
        if value is None or not self.rule.holds(value):
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise ConfigurationError(f"{called} is {shown}: {self.rule.words}")


def option(default: Any, meaning: str, rule: Rule | None = None, **details: Any) -> Any:
    """A field of a dataclass of options. `details` are further fields of `Option`."""
    metadata = {"meaning": meaning, "rule": rule, **details}
    return field(default=default, repr=not details.get("secret"), metadata=metadata)


def options_of(config: type | object) -> list[Option]:
    """The options of a dataclass: its fields that `option` has made, its own before those that it inherits."""
    kind = config if isinstance(config, type) else type(config)
    hints = get_type_hints(kind)
    declared = {each.name: each for each in fields(kind) if "meaning" in each.metadata}
    owners = {name: owner for owner in reversed(kind.__mro__) for name in vars(owner).get("__annotations__", ())}
    names = sorted(declared, key=lambda name: kind.__mro__.index(owners[name]))
    return [_option(declared[name], hints[name], owners[name]) for name in names]


def _option(each: Any, hint: Any, owner: type) -> Option:
    choices = get_args(hint) if get_origin(hint) is not tuple else ()
    kinds = [choice for choice in choices if choice is not type(None)] or [hint]
    flag = "--" + each.name.replace("_", "-")
    takes_none, group = len(choices) > len(kinds), (owner.__doc__ or "").partition(".")[0]
    return Option(each.name, kinds[0], each.default, takes_none, group=group, **{"flag": flag, **each.metadata})


def check_options(config: object) -> None:
    """Raises ConfigurationError, which names the option, if a value is out of bounds. For `__post_init__`."""
    for each in options_of(config):
        each.check(getattr(config, each.name), each.name)


def make(config: type[T], given: Mapping[str, Any], base: T | None = None) -> T:
    """Options from keyword arguments.

    Args:
        config: a dataclass of options.
        given: values by name. None leaves the default where None is not itself a value. Lists become tuples.
        base: its values hold where nothing is given, instead of the defaults.

    Raises:
        ConfigurationError: a value is out of bounds.
        TypeError: the option does not exist.
    """
    known = {each.name: each for each in options_of(config)}
    values = {}
    for name, value in given.items():
        each = known.get(name)
        if each is not None and each.is_list and value is not None:
            value = (value,) if isinstance(value, str) else tuple(value)
        if value is not None or each is None or each.takes_none:
            values[name] = value
    return config(**values) if base is None else replace(base, **values)  # type: ignore[type-var]


def described(config: type[T]) -> type[T]:
    """Decorator: adds the meanings of a dataclass's options to its docstring."""
    lines = [f"        {each.name}: {each.meaning}" for each in options_of(config)]
    config.__doc__ = "\n".join([(config.__doc__ or "").rstrip(), "", "    Args:", *lines, "    "])
    return config


def command_line(config: object) -> list[str]:
    """Returns the arguments of a command line that give these options. Defaults are left out."""
    words = []
    for each in options_of(config):
        value = getattr(config, each.name)
        if value == each.default or each.secret:
            continue
        if each.kind is bool:
            words.append(each.flag if value else f"--no-{each.flag[2:]}")
        else:
            words += [word for one in _written(each, value) for word in (each.flag, one)]
    return words


def _written(each: Option, value: Any) -> Iterable[str]:
    if each.is_list:
        return value
    if isinstance(value, tuple):
        return [":".join(map(str, value))]
    return [str(value / each.unit if each.unit != 1 else value)]
