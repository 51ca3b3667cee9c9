"""Lightning modules: one a task."""

from petals_lightning.modules.sequence_classification import SequenceClassificationModule

__all__ = ["SequenceClassificationModule"]
