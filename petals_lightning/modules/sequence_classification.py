"""Text classification by prompts and a head on a frozen language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import classification_report
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from petals_lightning.modules.tuning import TuningModule


class SequenceClassificationModule(TuningModule):
    """Trains prompts and a classification head; everything else is frozen.

    Batches: `input_ids` and `attention_mask` [B, S], `labels` [B]. Logs `train/loss` and `train/lr`; on
    validation and test `…/loss`, `…/accuracy`, `…/macro_f1` (F1, averaged over the classes) and `…/matthews` (Matthews
    correlation: 0 for guessing, whatever the classes' sizes).

    Args:
        model_name: hub id or folder of a causal language model.
        num_labels: number of classes.
        class_names: their names, for reports; None: 0, 1, …
        options: as for `TuningModule`.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
    """

    monitor, monitor_mode = "val/accuracy", "max"
    from_data = ("num_labels", "class_names")

    def __init__(self, model_name: str, *, num_labels: int = 2, class_names: list[str] | None = None, **options: Any):
        super().__init__(model_name, **options)
        self.class_names = class_names or [str(label) for label in range(num_labels)]
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "macro_f1": MulticlassF1Score(num_labels, average="macro"),
                "matthews": MulticlassMatthewsCorrCoef(num_labels),
            },
            compute_groups=False,  # each keeps its own few counts, and none depends on another's
        )
        self.val_scores, self.test_scores = scores.clone(prefix="val/"), scores.clone(prefix="test/")
        self._test_labels: list[Tensor] = []
        self._test_predictions: list[Tensor] = []

    # --- the model -------------------------------------------------------------------------------------------------

    def auto_classes(self) -> tuple[Any, Any]:
        from petals_lightning.models import AutoDistributedModelForSequenceClassification
        from petals_lightning.models.local import LocalModelForSequenceClassification

        return AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification

    def model_arguments(self) -> dict[str, Any]:
        # With `pad_token_id`: Hugging Face classifies at the last token that is not this one.
        return super().model_arguments() | {"num_labels": self.hparams["num_labels"]}

    def forward(self, **batch: Tensor) -> Any:
        """The model's output: `logits` [B, num_labels] and, given `labels` [B], `loss` (mean cross-entropy)."""
        return self.model(**batch)

    # --- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log_training(loss, len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.val_scores(output.logits, batch["labels"])
        # Weighted by the samples of each batch, so that a short last batch does not count as much as a full one.
        self.log("val/loss", output.loss, prog_bar=True, batch_size=len(batch["labels"]))
        self.log_dict(self.val_scores, prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.test_scores(output.logits, batch["labels"])
        self.log("test/loss", output.loss, batch_size=len(batch["labels"]))
        self.log_dict(self.test_scores, batch_size=len(batch["labels"]))
        self._test_labels.append(batch["labels"].cpu())
        self._test_predictions.append(output.logits.argmax(-1).cpu())

    def on_test_epoch_start(self) -> None:
        self._test_labels, self._test_predictions = [], []

    def on_test_epoch_end(self) -> None:
        """Prints scikit-learn's report and saves it as `test_report.txt` in the run folder."""
        report = classification_report(
            torch.cat(self._test_labels).numpy(),
            torch.cat(self._test_predictions).numpy(),
            labels=range(len(self.class_names)),
            target_names=self.class_names,
            digits=4,
            zero_division=0,
        )
        self.print(report)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "test_report.txt").write_text(report, encoding="utf-8")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`probabilities` [B, num_labels] and the most probable `labels` [B]."""
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}  # they may be missing or wrong
        probabilities = self(**unlabelled).logits.float().softmax(-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(-1)}
