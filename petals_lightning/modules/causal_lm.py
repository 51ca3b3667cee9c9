"""Tuning a language model: prompts make a frozen model answer as in dialogues, or continue texts.

Shapes: B batch, S tokens, N labelled tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from petals_lightning.data.collate import IGNORED
from petals_lightning.errors import ConfigurationError
from petals_lightning.models.reading import token_logits
from petals_lightning.modules.tuning import TuningModule


class CausalLMModule(TuningModule):
    """Trains prompts or LoRA to predict the next token at labelled positions; everything else is frozen.

    Batches: `input_ids`, `attention_mask` and `labels` [B, S], padded on the right. Labels are token ids, or -100 for
    tokens without a loss. Only hidden states that predict a label are sent over the wire. Logs `train/loss`,
    `train/lr`, and `val/loss`, `val/perplexity`, `test/loss`, `test/perplexity` over all labelled tokens.

    Args:
        model_name: hub id or folder of a causal language model.
        tuning_mode: `ptune`, `deep_ptune` or `lora`; there is no head to train alone.
        options: as for `TuningModule`.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
    """

    monitor, monitor_mode = "val/perplexity", "min"
    saves_prompts = True
    has_head = False

    def __init__(self, model_name: str, *, tuning_mode: str | None = "deep_ptune", **options: Any):
        super().__init__(model_name, tuning_mode=tuning_mode, **options)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def auto_classes(self) -> tuple[Any, Any]:
        from petals_lightning.models import AutoDistributedModelForCausalLM
        from petals_lightning.models.local import LocalModelForCausalLM

        return AutoDistributedModelForCausalLM, LocalModelForCausalLM

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Mean cross-entropy of the labelled tokens of a batch, and their number N.

        Raises:
            ConfigurationError: labels are not token ids.
        """
        targets, rows = labelled_tokens(self, input_ids, labels)
        logits = token_logits(self.model, input_ids, rows, attention_mask)  # [N, V]
        return torch.nn.functional.cross_entropy(logits.float(), targets), len(rows)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self(**batch)
        self.log_training(loss, len(batch["labels"]))
        return loss

    # Reset at the start of a pass: at its end, inference mode would make states that other modes cannot use.
    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_loss.update(*self(**batch))

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val", self.val_loss)

    def on_test_epoch_start(self) -> None:
        self.test_loss.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_loss.update(*self(**batch))

    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test", self.test_loss)

    def _log_perplexity(self, part: str, losses: MeanMetric) -> None:
        loss = losses.compute()  # over all tokens, whatever their batch
        self.log(f"{part}/loss", loss, prog_bar=True)
        self.log(f"{part}/perplexity", loss.exp(), prog_bar=True)


def labelled_tokens(module: TuningModule, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels [N] of a batch's labelled tokens, and where each is predicted: indices [N] into B·S.

    Args:
        module: for the error.
        input_ids: [B, S].
        labels: [B, S] token ids, or -100.

    Raises:
        ConfigurationError: labels are not token ids.
    """
    if labels.shape != input_ids.shape:
        raise ConfigurationError(
            f"labels have shape {list(labels.shape)}, input_ids {list(input_ids.shape)}: {type(module).__name__} "
            "trains on tokens; use its data (DialogueDataModule, PlainTextDataModule), or a task for labels"
        )
    sample, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # each is predicted at the position before
    return labels[sample, position + 1], sample * labels.shape[1] + position
