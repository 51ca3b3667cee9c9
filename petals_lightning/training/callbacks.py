"""The callbacks that a run is given in `callbacks`, beside its own."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging

from petals_lightning.errors import ConfigurationError
from petals_lightning.training.schema import unknown_setting

_NUMBERS: dict[Any, Any] = {bool: bool, int: int, float: (int, float)}  # an annotation, and what may be given for it


def build_callbacks(settings: DictConfig) -> list[Callback]:
    """The callbacks of a mapping of names and their settings: a `_target_`, and its arguments.

    Raises:
        ConfigurationError: one cannot be made of its settings, or would do nothing for the run.
    """
    return [_build(f"callbacks.{name!s}", node) for name, node in settings.items() if node is not None]


def _build(where: str, node: Any) -> Callback:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigurationError(
            f"{where} must have a _target_, e.g. {where}._target_=pytorch_lightning.callbacks.Timer; "
            "those of conf/callbacks go by name: callbacks=early_stopping"
        )
    target = node._target_
    try:
        unmade = instantiate(node, _partial_=True, _convert_="all")
    except HydraException as error:
        raise ConfigurationError(f"{where}: {target} cannot be made: {error.__cause__ or error}") from error
    if not isinstance(unmade.func, type) or not issubclass(unmade.func, Callback):
        raise ConfigurationError(
            f"{where}._target_={target}: no callback of pytorch_lightning, such as pytorch_lightning.callbacks.Timer"
        )
    _check_arguments(where, unmade)
    try:
        callback: Callback = unmade()
    except Exception as error:  # the user's arguments, which each class checks in its own way
        raise ConfigurationError(f"{where}: {target} cannot be made: {error}") from error
    if isinstance(callback, StochasticWeightAveraging):
        raise ConfigurationError(
            f"{where}: StochasticWeightAveraging averages after the last validation, so that no checkpoint has its "
            "weights; use callbacks=ema_weight_averaging"
        )
    return callback


def _check_arguments(where: str, unmade: partial[Callback]) -> None:
    parameters = inspect.signature(unmade.func).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for key, value in unmade.keywords.items():
        if key not in parameters and not takes_any:
            raise ConfigurationError(unknown_setting(f"{where}.{key}", parameters))
        kind: Any = parameters[key].annotation if key in parameters else None
        if kind in _NUMBERS and not isinstance(value, _NUMBERS[kind]):
            raise ConfigurationError(f"{where}.{key}={value}: must be of type {kind.__name__}")
