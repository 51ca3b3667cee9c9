"""Classifying texts with prompts and a head over a frozen language model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.metrics import classification_report
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from petals_lightning.data import load_tokenizer
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import trainable_state_dict
from petals_lightning.strategies import RemoteBlockStrategy, ServedModel, load_trained_weights

TUNING_MODES = (None, "ptune", "deep_ptune")


class SequenceClassificationModule(pl.LightningModule):
    """Trains prompts and a classification head; everything else is frozen.

    Under `RemoteBlockStrategy` the blocks are in its swarm; under any other the whole model is in this process.
    Batches: `input_ids` and `attention_mask` [B, S], `labels` [B]. Logs `train/loss`, `train/lr`, `val/loss`,
    `val/accuracy`, `test/loss`, `test/accuracy`.

    Args:
        model_name: hub id or folder of a causal language model.
        num_labels: number of classes.
        class_names: their names, for reports; None: 0, 1, …
        tuning_mode: None (head only), `ptune` (`pre_seq_len` virtual tokens before the text) or `deep_ptune` (as many
            more for every block).
        pre_seq_len: virtual tokens, P.
        lr: AdamW's peak learning rate.
        weight_decay: AdamW's.
        warmup_ratio: share of all steps in which the rate rises from 0 to `lr`; it then falls linearly to 0.
        dtype: of the frozen weights: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        revision: the model's revision on the hub.
        dht_prefix: the name of the model's blocks in the swarm; None derives it from `model_name`.
        token: for private models on the hub; None uses the login of this machine. Never saved.

    Raises:
        ConfigurationError: a value out of range; the message names the setting.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model_name: str,
        num_labels: int = 2,
        class_names: list[str] | None = None,
        tuning_mode: str | None = "deep_ptune",
        pre_seq_len: int = 16,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.06,
        dtype: str = "auto",
        revision: str | None = None,
        dht_prefix: str | None = None,
        token: str | None = None,
    ):
        super().__init__()
        if tuning_mode not in TUNING_MODES:
            raise ConfigurationError(f"tuning.mode={tuning_mode}: must be null, ptune or deep_ptune")
        if tuning_mode is not None and pre_seq_len < 1:
            raise ConfigurationError(
                f"tuning.pre_seq_len={pre_seq_len}: must be at least 1 virtual token, e.g. 16; "
                "to train the head alone set tuning=none"
            )
        if lr <= 0:
            raise ConfigurationError(f"optim.lr={lr}: must be above 0")
        if not 0 <= warmup_ratio <= 1:
            raise ConfigurationError(f"optim.warmup_ratio={warmup_ratio}: must be between 0 and 1")
        self.save_hyperparameters(ignore=["token"])
        self.served_model = ServedModel(model_name, dtype, revision, dht_prefix)
        self.class_names = class_names or [str(label) for label in range(num_labels)]
        self._token = token
        self._session: int | None = None
        self._rng_state: Tensor | None = None
        self.val_accuracy = MulticlassAccuracy(num_labels, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_labels, average="micro")
        self._test_labels: list[Tensor] = []
        self._test_predictions: list[Tensor] = []

    # --- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the model, or connects it anew when the Trainer has joined the swarm again."""
        strategy = self.trainer.strategy if self._trainer is not None else None
        session = strategy.session if isinstance(strategy, RemoteBlockStrategy) else 0
        if self._session == session:
            return
        kept = None if self._session is None else trainable_state_dict(self)
        self.model = self._remote_model(strategy) if isinstance(strategy, RemoteBlockStrategy) else self._local_model()
        if kept is not None:
            load_trained_weights(self, kept)
        self._session = session

    def _remote_model(self, strategy: RemoteBlockStrategy) -> PreTrainedModel:
        from petals_lightning.models import AutoDistributedModelForSequenceClassification

        return AutoDistributedModelForSequenceClassification.from_pretrained(
            self.hparams["model_name"], **self._model_arguments(), **strategy.client_arguments
        )

    def _local_model(self) -> PreTrainedModel:
        from petals_lightning.models.local import LocalModelForSequenceClassification

        return LocalModelForSequenceClassification.from_pretrained(
            self.hparams["model_name"], **self._model_arguments()
        )

    def _model_arguments(self) -> dict[str, Any]:
        names = ("dtype", "revision", "tuning_mode", "num_labels")
        arguments = {name: self.hparams[name] for name in names} | {"token": self._token}
        # Hugging Face classifies at the last token that is not this one.
        tokenizer = load_tokenizer(self.hparams["model_name"], revision=self.hparams["revision"], token=self._token)
        arguments["pad_token_id"] = tokenizer.pad_token_id
        arguments["pre_seq_len"] = self.hparams["pre_seq_len"] if self.hparams["tuning_mode"] else None
        return arguments

    def forward(self, **batch: Tensor) -> Any:
        """The model's output: `logits` [B, num_labels] and, given `labels` [B], `loss` (mean cross-entropy)."""
        return self.model(**batch)

    # --- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.val_accuracy(output.logits, batch["labels"])
        # Weighted by the samples of each batch, so that a short last batch does not count as much as a full one.
        self.log("val/loss", output.loss, prog_bar=True, batch_size=len(batch["labels"]))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self(**batch)
        self.test_accuracy(output.logits, batch["labels"])
        self.log("test/loss", output.loss, batch_size=len(batch["labels"]))
        self.log("test/accuracy", self.test_accuracy, batch_size=len(batch["labels"]))
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
        (Path(self.trainer.default_root_dir) / "test_report.txt").write_text(report, encoding="utf-8")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`probabilities` [B, num_labels] and the most probable `labels` [B]."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        probabilities = self(**inputs).logits.float().softmax(-1)
        return {"probabilities": probabilities, "labels": probabilities.argmax(-1)}

    # --- training and its checkpoints --------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.hparams["warmup_ratio"] * steps)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        # The frozen model is in eval mode on purpose: neither servers nor client apply dropout to it.
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training")
        # GradScaler leaves out the first optimizer steps while it looks for its scale; the schedule goes on.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")

    def on_train_start(self) -> None:
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state.cpu())
            self._rng_state = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["torch_rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint.get("torch_rng_state")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Trained weights only, under every strategy."""
        return trainable_state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes trained weights only; see `load_trained_weights`."""
        load_trained_weights(self, state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])
