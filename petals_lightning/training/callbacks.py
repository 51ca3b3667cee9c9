"""The callbacks that a run is given in `callbacks`, beside its own."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging

from petals_lightning.errors import ConfigurationError
from petals_lightning.training.targets import find_target


def build_callbacks(settings: DictConfig) -> list[Callback]:
    """The callbacks of a mapping of names and their settings: a `_target_`, and its arguments.

    Raises:
        ConfigurationError: one cannot be made of its settings, or would do nothing for the run.
    """
    return [_build(f"callbacks.{name!s}", node) for name, node in settings.items() if node is not None]


def _build(where: str, node: Any) -> Callback:
    unmade = find_target(
        where,
        node,
        Callback,
        "no callback of pytorch_lightning, such as pytorch_lightning.callbacks.Timer",
        hint=f"{where}._target_=pytorch_lightning.callbacks.Timer; those of conf/callbacks go by name: "
        "callbacks=early_stopping",
    )
    try:
        callback: Callback = unmade()
    except Exception as error:  # the user's arguments, which each class checks in its own way
        raise ConfigurationError(f"{where}: {node._target_} cannot be made: {error}") from error
    if isinstance(callback, StochasticWeightAveraging):
        raise ConfigurationError(
            f"{where}: StochasticWeightAveraging averages after the last validation, so that no checkpoint has its "
            "weights; use callbacks=ema_weight_averaging"
        )
    return callback
