"""AutoDistributed* (Hugging Face models whose blocks are in a swarm), prompts, LoRA, and the same models locally."""

from petals_lightning.models.adapter_files import save_adapter
from petals_lightning.models.auto import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from petals_lightning.models.prompt_files import PromptCard, export_peft, load_prompts, save_prompts
from petals_lightning.models.prompt_hub import push_adapter_to_hub, push_prompts_to_hub
from petals_lightning.models.trainable import lora_of, prompts_of, trainable_state_dict

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "PromptCard",
    "export_peft",
    "load_prompts",
    "lora_of",
    "prompts_of",
    "push_adapter_to_hub",
    "push_prompts_to_hub",
    "remote_blocks",
    "save_adapter",
    "save_prompts",
    "trainable_state_dict",
]
