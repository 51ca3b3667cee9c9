"""Fine-tune language models far bigger than your GPU: prompts on your machine, frozen blocks in a swarm."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# hivemind reads this when it is first imported: without it, bfloat16 tensors travel as float32.
os.environ.setdefault("USE_LEGACY_BFLOAT16", "0")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from petals_lightning import errors as errors
    from petals_lightning.client import ClientConfig as ClientConfig
    from petals_lightning.client import RemoteSequential as RemoteSequential
    from petals_lightning.data import DialogueDataModule as DialogueDataModule
    from petals_lightning.data import PlainTextDataModule as PlainTextDataModule
    from petals_lightning.data import PreferenceDataModule as PreferenceDataModule
    from petals_lightning.data import TextClassificationDataModule as TextClassificationDataModule
    from petals_lightning.data import TextLabelSetDataModule as TextLabelSetDataModule
    from petals_lightning.data import TextNumberDataModule as TextNumberDataModule
    from petals_lightning.models import AutoDistributedConfig as AutoDistributedConfig
    from petals_lightning.models import AutoDistributedModel as AutoDistributedModel
    from petals_lightning.models import AutoDistributedModelForCausalLM as AutoDistributedModelForCausalLM
    from petals_lightning.models import (
        AutoDistributedModelForSequenceClassification as AutoDistributedModelForSequenceClassification,
    )
    from petals_lightning.models import export_peft as export_peft
    from petals_lightning.models import load_prompts as load_prompts
    from petals_lightning.models import lora_of as lora_of
    from petals_lightning.models import prompts_of as prompts_of
    from petals_lightning.models import push_adapter_to_hub as push_adapter_to_hub
    from petals_lightning.models import push_prompts_to_hub as push_prompts_to_hub
    from petals_lightning.models import save_adapter as save_adapter
    from petals_lightning.models import save_prompts as save_prompts
    from petals_lightning.modules import CausalLMModule as CausalLMModule
    from petals_lightning.modules import DistillationModule as DistillationModule
    from petals_lightning.modules import MultiLabelModule as MultiLabelModule
    from petals_lightning.modules import PreferenceModule as PreferenceModule
    from petals_lightning.modules import RegressionModule as RegressionModule
    from petals_lightning.modules import RewardModule as RewardModule
    from petals_lightning.modules import SequenceClassificationModule as SequenceClassificationModule
    from petals_lightning.modules import VerbalizedClassificationModule as VerbalizedClassificationModule
    from petals_lightning.strategies import LocalSwarm as LocalSwarm
    from petals_lightning.strategies import PrivateSwarm as PrivateSwarm
    from petals_lightning.strategies import PublicSwarm as PublicSwarm
    from petals_lightning.strategies import RemoteBlockStrategy as RemoteBlockStrategy
    from petals_lightning.swarm import SwarmNode as SwarmNode

_EXPORTS = {
    "client": "ClientConfig RemoteSequential",
    "data": "DialogueDataModule PlainTextDataModule PreferenceDataModule TextClassificationDataModule "
    "TextLabelSetDataModule TextNumberDataModule",
    "models": "AutoDistributedConfig AutoDistributedModel AutoDistributedModelForCausalLM "
    "AutoDistributedModelForSequenceClassification "
    "export_peft load_prompts lora_of prompts_of push_adapter_to_hub push_prompts_to_hub save_adapter save_prompts",
    "modules": "CausalLMModule DistillationModule MultiLabelModule PreferenceModule RegressionModule RewardModule "
    "SequenceClassificationModule VerbalizedClassificationModule",
    "strategies": "LocalSwarm PrivateSwarm PublicSwarm RemoteBlockStrategy",
    "swarm": "SwarmNode",
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}
__all__ = ["__version__", "errors", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    # The command line and the guard process must start without importing torch and transformers.
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name == "errors":
        return import_module(f"{__name__}.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
