"""Tuning towards another model's distribution.

Shapes: B batch, S tokens, N labelled tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf.tokenizer import load_tokenizer
from petals_lightning.models.reading import token_logits
from petals_lightning.modules.causal_lm import CausalLMModule, labelled_tokens
from petals_lightning.strategies import RemoteBlockStrategy


class DistillationModule(CausalLMModule):
    """Trains prompts or LoRA to predict what a teacher predicts at labelled positions; everything else is frozen.

    A step is a pass through the teacher without gradients, and one through the model. Logs `train/loss`, which is the
    loss below, and on validation and test the loss and perplexity of the labels, as `CausalLMModule`.

    Args:
        model_name: hub id or folder of a causal language model.
        teacher: hub id or folder of a causal language model with the same tokens; may be the same model.
        teacher_adapter: LoRA that acts in the teacher; see `active_adapter`.
        teacher_dht_prefix: the name under which the run's swarm serves the teacher's blocks; None: the whole teacher is
            loaded into this process.
        temperature: T, by which logits are divided.
        top_k: tokens of the teacher that count, the most probable ones; None: all.
        share: of distillation in the loss, from 0 to 1; the rest is the cross-entropy of the labels.
        options: as for `CausalLMModule`.

    Raises:
        ConfigurationError: a value out of range; or, once the models are loaded, the teacher has other tokens.
    """

    def __init__(
        self,
        model_name: str,
        *,
        teacher: str,
        teacher_adapter: str | None = None,
        teacher_dht_prefix: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        share: float = 1.0,
        **options: Any,
    ):
        super().__init__(model_name, **options)
        if temperature <= 0:
            raise ConfigurationError(f"temperature={temperature}: must be above 0")
        if top_k is not None and top_k < 1:
            raise ConfigurationError(f"top_k={top_k}: must be at least 1, or None for all tokens")
        if not 0 <= share <= 1:
            raise ConfigurationError(f"share={share}: must be between 0 and 1")
        self._teacher: list[Any] = []  # in a list, it is no part of this module: not trained, moved or saved with it

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.distil(**batch)
        self.log_training(loss, len(batch["labels"]))
        return loss

    def distil(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: share · `distillation_loss` + (1 − share) · cross-entropy of the labels."""
        targets, rows = labelled_tokens(self, input_ids, labels)
        with torch.no_grad():
            (teacher,) = self._teacher
            device = next(teacher.parameters()).device
            wanted = token_logits(teacher, input_ids.to(device), rows.to(device), attention_mask.to(device))
        logits = token_logits(self.model, input_ids, rows, attention_mask)
        given, settings = self.hparams["share"], {name: self.hparams[name] for name in ("temperature", "top_k")}
        loss = given * distillation_loss(logits, wanted.to(logits.device), **settings)
        if given < 1:
            loss = loss + (1 - given) * torch.nn.functional.cross_entropy(logits.float(), targets)
        return loss

    def teardown(self, stage: str) -> None:
        for teacher in self._teacher:
            if hasattr(teacher, "close"):
                teacher.close()
        self._teacher.clear()

    def _load(self, strategy: Any) -> PreTrainedModel:
        name, prefix = self.hparams["teacher"], self.hparams["teacher_dht_prefix"]
        own, theirs = (
            tokenizer.get_vocab() for tokenizer in (self.load_tokenizer(), load_tokenizer(name, token=self._token))
        )
        if own != theirs:
            raise ConfigurationError(
                f"teacher={name}: its tokens differ from those of {self.hparams['model_name']!r}; give a teacher with "
                "the same tokenizer"
            )
        distributed, local = self.auto_classes()
        given = {"dtype": self.hparams["dtype"], "active_adapter": self.hparams["teacher_adapter"]}
        given["token"] = self._token
        if prefix is None:
            teacher = local.from_pretrained(name, **given)
        elif isinstance(strategy, RemoteBlockStrategy):
            teacher = distributed.from_pretrained(name, **given, **strategy.client_arguments | {"dht_prefix": prefix})
        else:
            raise ConfigurationError(
                f"teacher_dht_prefix={prefix}: there is no swarm; leave it off to load the teacher into this process"
            )
        self._teacher[:] = [teacher.requires_grad_(False).eval()]
        return super()._load(strategy)


def distillation_loss(logits: Tensor, teacher: Tensor, *, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """The mean of T² KL(p ‖ q), where p and q are the softmax of the teacher's and the model's logits divided by T.

    Hinton et al. 2015 (arXiv:1503.02531), section 2: T² keeps the size of gradients whatever T is. With `top_k`, p is
    restricted to the teacher's k most probable tokens and scaled to a sum of 1; q is not.

    Args:
        logits, teacher: [N, V]; if one has more columns, for tokens that do not exist, these are left out.
        temperature: T.
        top_k: k, or None.
    """
    size = min(logits.shape[-1], teacher.shape[-1])
    own = (logits[:, :size].float() / temperature).log_softmax(-1)
    teacher = teacher[:, :size].float() / temperature
    if top_k is not None:
        teacher, chosen = teacher.topk(min(top_k, size))
        own = own.gather(-1, chosen)
    wanted = teacher.log_softmax(-1)
    return temperature**2 * (wanted.exp() * (wanted - own)).sum(-1).mean()
