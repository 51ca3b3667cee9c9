"""Tuning on preferences: which of two answers is the better one.

Shapes: B pairs, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from petals_lightning.errors import ConfigurationError
from petals_lightning.models.reading import token_logits
from petals_lightning.models.trainable import without_tuning
from petals_lightning.modules.causal_lm import CausalLMModule, labelled_tokens
from petals_lightning.modules.sequence_classification import SequenceClassificationModule
from petals_lightning.modules.tuning import TuningModule


class PairLoss(NamedTuple):
    """The mean `loss` of B pairs, and by how much [B] each chosen answer is ahead of the rejected one."""

    loss: Tensor
    margins: Tensor


class _PairModule(TuningModule):
    """The steps of modules whose `forward` returns a `PairLoss`. Logs `…/loss` and `…/accuracy`.

    Batches: `input_ids`, `attention_mask` and `labels` [2·B, S]: B chosen answers, then the B rejected ones.
    """

    monitor, monitor_mode = "val/loss", "min"  # accuracy is often 1 from the first epoch on

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log_training(loss, len(batch["labels"]) // 2)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, part: str, batch: dict[str, Tensor]) -> None:
        found, count = self(**batch), len(batch["labels"]) // 2
        self.log(f"{part}/loss", found.loss, prog_bar=True, batch_size=count)
        self.log(f"{part}/accuracy", (found.margins > 0).float().mean(), prog_bar=True, batch_size=count)


class PreferenceModule(_PairModule):
    """Trains prompts or LoRA by direct preference optimisation. The reference is the frozen model without them.

    So there is no second model: a step is a pass of 2·B samples with the tuning, and one without it and without
    gradients. Logs the loss, and as accuracy the share of pairs whose chosen answer has gained more.

    Args:
        model_name: hub id or folder of a causal language model.
        beta: how much the model's own distribution weighs; larger values stay closer to it.
        tuning_mode: `ptune`, `deep_ptune` or `lora`.
        options: as for `TuningModule`.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
    """

    saves_prompts = True
    has_head = False
    auto_classes = CausalLMModule.auto_classes

    def __init__(self, model_name: str, *, beta: float = 0.1, tuning_mode: str | None = "deep_ptune", **options: Any):
        super().__init__(model_name, tuning_mode=tuning_mode, **options)
        if beta <= 0:
            raise ConfigurationError(f"beta={beta}: must be above 0, e.g. 0.1")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PairLoss:
        """The loss of a batch; see `preference_loss`.

        Raises:
            ConfigurationError: labels are not token ids.
        """
        with torch.no_grad(), without_tuning(self.model):
            reference = self.answer_log_probabilities(input_ids, attention_mask, labels)
        policy = self.answer_log_probabilities(input_ids, attention_mask, labels)
        return preference_loss(policy, reference, self.hparams["beta"])

    def answer_log_probabilities(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The log-probability [2·B] of the labelled tokens of each sample, summed."""
        targets, rows = labelled_tokens(self, input_ids, labels)
        logits = token_logits(self.model, input_ids, rows, attention_mask)
        each = -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return each.new_zeros(len(labels)).index_add(0, rows // labels.shape[1], each)


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> PairLoss:
    """The loss of direct preference optimisation, −log σ(β (Δ_policy − Δ_reference)), Δ being chosen minus rejected.

    Rafailov et al. 2023 (arXiv:2305.18290), equation 7; TRL's `DPOTrainer` with `loss_type="sigmoid"`.

    Args:
        policy, reference: [2·B] log-probabilities of the answers, the B chosen ones first.
        beta: β.
    """
    chosen, rejected = (beta * (policy - reference)).chunk(2)
    margins = chosen - rejected
    return PairLoss(-torch.nn.functional.logsigmoid(margins).mean(), margins.detach())


class RewardModule(_PairModule):
    """Trains a head that gives each answer a number, the chosen ones larger numbers, and prompts or LoRA with it.

    The loss is −log σ(r_chosen − r_rejected) (Bradley and Terry 1952; Ouyang et al. 2022, equation 1; TRL's
    `RewardTrainer`). Logs it, and as accuracy the share of pairs whose chosen answer has the larger number.

    Args:
        model_name: hub id or folder of a causal language model.
        options: as for `TuningModule`.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
    """

    auto_classes = SequenceClassificationModule.auto_classes

    def model_arguments(self) -> dict[str, Any]:
        return super().model_arguments() | {"num_labels": 1}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> PairLoss:
        """The loss of a batch. `labels` are not used: the whole text is rated, at its last token."""
        rewards = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float()
        chosen, rejected = rewards.chunk(2)
        return PairLoss(-torch.nn.functional.logsigmoid(chosen - rejected).mean(), (chosen - rejected).detach())
