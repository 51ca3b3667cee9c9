"""Classes that settings name by `_target_`: those of this package and those of users are treated alike."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from petals_lightning.errors import ConfigurationError
from petals_lightning.training.schema import unknown_setting

_NUMBERS: dict[Any, Any] = {bool: bool, int: int, float: (int, float)}  # an annotation, and what may be given for it


def find_target(where: str, node: Any, base: type, refusal: str, *, hint: str) -> partial[Any]:
    """Returns the class of a `_target_` with its settings filled in. Call it with further arguments to make the object.

    Args:
        where: the settings' name, e.g. `callbacks.timer`.
        node: the settings.
        base: the class that it must be derived from.
        refusal: ends the error about a class that is not derived from it.
        hint: ends the error about a missing `_target_`.

    Raises:
        ConfigurationError: the class does not exist, is of another kind, or does not take a setting.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigurationError(f"{where} must have a _target_, e.g. {hint}")
    target = node._target_
    try:
        unmade: partial[Any] = instantiate(node, _partial_=True, _convert_="all")
    except HydraException as error:
        raise ConfigurationError(f"{where}: {target} cannot be made: {error.__cause__ or error}") from error
    if not isinstance(unmade.func, type) or not issubclass(unmade.func, base):
        raise ConfigurationError(f"{where}._target_={target}: {refusal}")
    _check_arguments(where, unmade, base)
    return unmade


def _check_arguments(where: str, unmade: partial[Any], base: type) -> None:
    parameters, takes_any = _parameters(unmade.func, base)
    for key, value in unmade.keywords.items():
        if key not in parameters and not takes_any:
            raise ConfigurationError(unknown_setting(f"{where}.{key}", parameters))
        kind: Any = parameters[key].annotation if key in parameters else None
        if kind in _NUMBERS and not isinstance(value, _NUMBERS[kind]):
            raise ConfigurationError(f"{where}.{key}={value}: must be of type {kind.__name__}")


def _parameters(kind: Any, base: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments of a class, and whether it takes any.

    If `base` has a constructor, **options of the classes derived from it are passed on to it.
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in kind.__mro__[: kind.__mro__.index(base) + 1] if "__init__" in vars(base) else (kind,):
        if owner is kind or "__init__" in vars(owner):
            own = inspect.signature(owner).parameters.values()
            found = {each.name: each for each in own if each.kind is not each.VAR_KEYWORD} | found
            if not any(each.kind is each.VAR_KEYWORD for each in own):
                return found, False
    return found, True
