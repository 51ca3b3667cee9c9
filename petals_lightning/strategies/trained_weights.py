"""Loading what a checkpoint holds: the trained weights of a module and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from petals_lightning.errors import CheckpointError
from petals_lightning.models import trainable_state_dict


def load_trained_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the parameters of the same names.

    Raises:
        CheckpointError: names or shapes differ from the module's trained weights; nothing has been copied.
    """
    own = trainable_state_dict(module)
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is not trained here" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    if faults:
        raise CheckpointError(
            f"the checkpoint was trained with other settings: {'; '.join(sorted(faults))}. "
            "Use the tuning mode, pre_seq_len, num_labels and model that it was trained with"
        )
    for name, weight in own.items():
        weight.copy_(weights[name])
