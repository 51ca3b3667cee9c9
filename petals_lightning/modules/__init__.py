"""Lightning modules, one per task."""

from petals_lightning.modules.causal_lm import CausalLMModule
from petals_lightning.modules.distillation import DistillationModule
from petals_lightning.modules.preference import PreferenceModule, RewardModule
from petals_lightning.modules.sequence_classification import SequenceClassificationModule
from petals_lightning.modules.text_targets import MultiLabelModule, RegressionModule
from petals_lightning.modules.tuning import TuningModule
from petals_lightning.modules.verbalized_classification import VerbalizedClassificationModule

__all__ = [
    "CausalLMModule",
    "DistillationModule",
    "MultiLabelModule",
    "PreferenceModule",
    "RegressionModule",
    "RewardModule",
    "SequenceClassificationModule",
    "TuningModule",
    "VerbalizedClassificationModule",
]
