"""The number of optimizer steps of a fit, for learning rate schedules."""

from __future__ import annotations

import math

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from petals_lightning.errors import ConfigurationError


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Returns the optimizer steps of a whole fit, with those before a resume; None if it is not known in advance.

    Raises:
        ConfigurationError: `accumulate_grad_batches` is below 1.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ConfigurationError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: must be at least 1, one batch a step"
        )
    if trainer.limit_train_batches == 0:
        return 0
    steps, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Lightning's estimate takes the first epoch's accumulation for all.
        if isinstance(callback, GradientAccumulationScheduler) and epochs is not None and 0 < steps < math.inf:
            batches = trainer.num_training_batches
            steps = sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
            steps = min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps
    return int(steps) if 0 < steps < math.inf else None
