"""Fine-tune language models far bigger than your GPU: prompts on your machine, frozen blocks in a swarm."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# hivemind reads this when it is first imported: without it, bfloat16 tensors travel as float32.
os.environ.setdefault("USE_LEGACY_BFLOAT16", "0")

__version__ = "0.1.0"

_EXPORTS = {
    "AutoDistributedConfig": "petals_lightning.models",
    "AutoDistributedModel": "petals_lightning.models",
    "AutoDistributedModelForCausalLM": "petals_lightning.models",
    "AutoDistributedModelForSequenceClassification": "petals_lightning.models",
    "RemoteSequential": "petals_lightning.client",
    "RemoteBlockStrategy": "petals_lightning.strategies",
}
__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "RemoteBlockStrategy",
    "RemoteSequential",
    "__version__",
]

if TYPE_CHECKING:
    from petals_lightning.client import RemoteSequential
    from petals_lightning.models import (
        AutoDistributedConfig,
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
    )
    from petals_lightning.strategies import RemoteBlockStrategy


def __getattr__(name: str) -> Any:
    # The command line and the guard process must start without importing torch and transformers.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
