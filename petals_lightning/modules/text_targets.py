"""Heads over texts for other targets than one class: a number, or any number of classes.

Shapes: B batch, S tokens, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy, MultilabelExactMatch, MultilabelF1Score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef

from petals_lightning.errors import ConfigurationError
from petals_lightning.modules.sequence_classification import SequenceClassificationModule
from petals_lightning.modules.tuning import TuningModule


class _TextTargetModule(TuningModule):
    """The steps of modules whose model has a head, and whose loss Hugging Face computes.

    Batches: `input_ids` and `attention_mask` [B, S], and `labels`. Logs the loss and `scores`.
    """

    problem_type: str
    """Hugging Face's name of the loss."""
    auto_classes = SequenceClassificationModule.auto_classes

    def __init__(self, model_name: str, **options: Any):
        super().__init__(model_name, **options)
        scores = MetricCollection(self._scores(), compute_groups=False)
        self.val_scores, self.test_scores = scores.clone(prefix="val/"), scores.clone(prefix="test/")

    def _scores(self) -> dict[str, Any]:
        """Metrics by name."""
        raise NotImplementedError

    def _outputs(self, logits: Tensor) -> Tensor:
        """What `scores` and predictions take from logits [B, C]."""
        raise NotImplementedError

    def model_arguments(self) -> dict[str, Any]:
        return super().model_arguments() | {"num_labels": 1, "problem_type": self.problem_type}

    def forward(self, **batch: Tensor) -> Any:
        """The model's output: `logits` [B, C] and, given `labels`, `loss`."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log_training(loss, len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_scores, batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_scores, batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The predicted numbers [B], or probabilities [B, C]."""
        return self._outputs(self(**{name: value for name, value in batch.items() if name != "labels"}).logits.float())

    def _evaluate(self, part: str, scores: MetricCollection, batch: dict[str, Tensor]) -> None:
        output, labels = self(**batch), batch["labels"]
        scores(self._outputs(output.logits.float()), labels if self.problem_type == "regression" else labels.long())
        self.log(f"{part}/loss", output.loss, prog_bar=True, batch_size=len(labels))
        self.log_dict(scores, prog_bar=True, batch_size=len(labels))


class RegressionModule(_TextTargetModule):
    """Trains a head that gives each text a number, and prompts or LoRA with it, by the mean squared error.

    Batches: `labels` [B] are the numbers. Logs `…/loss`, `…/mse`, `…/mae` (mean absolute error) and `…/pearson`
    (correlation).

    Args:
        model_name: hub id or folder of a causal language model.
        options: as for `TuningModule`.
    """

    monitor, monitor_mode = "val/mse", "min"
    problem_type = "regression"

    def _scores(self) -> dict[str, Any]:
        return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "pearson": PearsonCorrCoef()}

    def _outputs(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


class MultiLabelModule(_TextTargetModule):
    """Trains a head that tells which classes a text has, one or more or none, and prompts or LoRA with it.

    Batches: `labels` [B, C], 1 or 0 for each class. The loss is the mean binary cross-entropy. Logs `…/loss`,
    `…/micro_f1` (F1 of all classes' decisions together), `…/accuracy` (of these decisions) and `…/exact` (share of
    texts whose classes are all right).

    Args:
        model_name: hub id or folder of a causal language model.
        num_labels: C.
        class_names: their names.
        options: as for `TuningModule`.
    """

    monitor, monitor_mode = "val/micro_f1", "max"
    problem_type = "multi_label_classification"
    from_data = ("num_labels", "class_names")

    def __init__(self, model_name: str, *, num_labels: int, class_names: list[str] | None = None, **options: Any):
        super().__init__(model_name, **options)
        self.class_names = class_names or [str(label) for label in range(num_labels)]

    def forward(self, **batch: Tensor) -> Any:
        """As of the base. Raises ConfigurationError if labels are not vectors of 0 and 1."""
        if (labels := batch.get("labels")) is not None and labels.ndim != 2:
            raise ConfigurationError(
                f"labels have shape {list(labels.shape)}: {type(self).__name__} needs a vector of 0 and 1 for each "
                "text; use TextLabelSetDataModule (data=label_sets), or a task for one class"
            )
        return super().forward(**batch)

    def _scores(self) -> dict[str, Any]:
        return {
            "micro_f1": MultilabelF1Score(self.hparams["num_labels"], average="micro"),
            "accuracy": MultilabelAccuracy(self.hparams["num_labels"], average="micro"),
            "exact": MultilabelExactMatch(self.hparams["num_labels"]),
        }

    def _outputs(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def model_arguments(self) -> dict[str, Any]:
        return super().model_arguments() | {"num_labels": self.hparams["num_labels"]}
