"""Mixed precision, on CPUs too."""

from __future__ import annotations

import torch
from pytorch_lightning.plugins import MixedPrecision, Precision

from petals_lightning.errors import ConfigurationError

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def precision_plugin(precision: str, device_type: str) -> Precision:
    """The plugin for `32-true`, `16-mixed` (autocast and GradScaler) or `bf16-mixed`.

    `Trainer(precision="16-mixed")` silently becomes bf16 on a CPU; this keeps float16.

    Args:
        precision: one of `PRECISIONS`.
        device_type: `cpu`, `cuda`, …

    Raises:
        ConfigurationError: another precision.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
    if precision == "32-true":
        return Precision()
    if precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", device_type)
    return MixedPrecision("16-mixed", device_type, scaler=torch.amp.GradScaler(device_type))
