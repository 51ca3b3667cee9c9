"""AutoDistributed*: Hugging Face models whose blocks live in a swarm; prompts; the same models run locally."""

from petals_lightning.models.trainable import prompts_of, trainable_state_dict

__all__ = ["prompts_of", "trainable_state_dict"]
