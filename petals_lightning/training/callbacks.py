"""The callbacks that a run is given in `callbacks`, beside its own."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging

from petals_lightning.errors import ConfigurationError
from petals_lightning.training.schema import unknown_setting


def build_callbacks(settings: DictConfig) -> list[Callback]:
    """The callbacks of a mapping of names and their settings: a `_target_`, and its arguments.

    Raises:
        ConfigurationError: one cannot be made of its settings, or would do nothing for the run.
    """
    return [_build(f"callbacks.{name}", node) for name, node in settings.items() if node is not None]


def _build(where: str, node: Any) -> Callback:
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigurationError(
            f"{where} must have a _target_, e.g. {where}._target_=pytorch_lightning.callbacks.Timer; "
            "those of conf/callbacks go by name: callbacks=early_stopping"
        )
    target = node._target_
    try:
        _refuse_unread(where, node)
        callback = instantiate(node, _convert_="all")
    except HydraException as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigurationError(f"{where}: {target} cannot be made: {reason}") from error
    if not isinstance(callback, Callback):
        raise ConfigurationError(
            f"{where}._target_={target}: no callback of pytorch_lightning, such as pytorch_lightning.callbacks.Timer"
        )
    if isinstance(callback, StochasticWeightAveraging):
        raise ConfigurationError(
            f"{where}: StochasticWeightAveraging averages after the last validation, so that no checkpoint has its "
            "weights; use callbacks=ema_weight_averaging"
        )
    return callback


def _refuse_unread(where: str, node: DictConfig) -> None:
    parameters = inspect.signature(get_object(node._target_)).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for key in node:
        if not str(key).startswith("_") and key not in parameters:
            raise ConfigurationError(unknown_setting(f"{where}.{key}", parameters))
