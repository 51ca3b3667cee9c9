"""Loading of checkpoints, which hold the trained weights of a module and nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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


@contextmanager
def no_code_from(path: object) -> Iterator[None]:
    """Explains, around the loading of a checkpoint with `weights_only=True`, why torch refuses a file.

    Raises:
        CheckpointError: the file holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError as e:
        if "Weights only load failed" not in str(e):
            raise  # of something else that was unpickled meanwhile
        why = next((line.strip() for line in str(e).splitlines() if "GLOBAL" in line or "Unsupported" in line), str(e))
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is not read: only tensors and plain values are taken from one, because "
            f"anything else can run code on this machine ({why[:300]}). Use a checkpoint that was saved here; if one "
            "holds objects of your own callbacks and you trust who made it, name their classes to "
            "torch.serialization.add_safe_globals"
        ) from e
