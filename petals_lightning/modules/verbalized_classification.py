"""Text classification by the words that a frozen language model puts after a text: prompts only, no head.

Shapes: B batch, S tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import ConfigurationError
from petals_lightning.models.reading import token_logits
from petals_lightning.modules.sequence_classification import SequenceClassificationModule


class WordScores(NamedTuple):
    """`logits` [B, C] of the classes' words, and the `loss` (cross-entropy among these words) if there are labels."""

    loss: Tensor | None
    logits: Tensor


class VerbalizedClassificationModule(SequenceClassificationModule):
    """Classifies a text by the language model's logits of one word for each class, at the text's last token.

    The texts of the data end where the answer follows: `TextClassificationDataModule(…, template="{text} It was")`.
    Only the hidden state of the last token is fetched from servers. No head has to be learned. Logs
    the same as `SequenceClassificationModule`.

    Args:
        model_name: hub id or folder of a causal language model.
        verbalizer: each class's word, which is one token: `{0: " bad", 1: " great"}`. Keys are the classes' names or
            numbers.
        options: as for `SequenceClassificationModule`.

    Raises:
        ConfigurationError: the words do not fit the classes, or (once the model is loaded) a word is not one token, two
            words are the same token, or the data have no template.
    """

    saves_prompts = True
    has_head = False

    def __init__(self, model_name: str, *, verbalizer: Mapping[Any, str], **options: Any):
        super().__init__(model_name, **options)
        self.words = _words_by_class(verbalizer, self.class_names)
        self._word_tokens = torch.empty(0, dtype=torch.long)

    def auto_classes(self) -> tuple[Any, Any]:
        from petals_lightning.models import AutoDistributedModelForCausalLM
        from petals_lightning.models.local import LocalModelForCausalLM

        return AutoDistributedModelForCausalLM, LocalModelForCausalLM

    def model_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in super().model_arguments().items() if name != "num_labels"}

    def _load(self, strategy: Any) -> PreTrainedModel:
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextClassificationDataModule) and data.template is None:
            raise ConfigurationError(
                "template=None: the words of a verbalizer follow a template; set template='{text} It was', or "
                "template='{text}' if the texts themselves end where the word follows"
            )
        self._word_tokens = _tokens_of(self.words, self.load_tokenizer())
        return super()._load(strategy)

    def forward(self, **batch: Tensor) -> WordScores:
        """The scores of the classes' words at the last token.

        Args:
            batch: `input_ids` and `attention_mask` [B, S], padded on the right, and `labels` [B] or none.
        """
        input_ids, mask = batch["input_ids"], batch["attention_mask"]
        size, length = input_ids.shape
        last = torch.arange(size, device=input_ids.device) * length + mask.sum(1) - 1
        logits = token_logits(self.model, input_ids, last, mask)  # [B, V]
        logits = logits[:, self._word_tokens.to(logits.device)].float()
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"]) if "labels" in batch else None
        return WordScores(loss, logits)


def _words_by_class(verbalizer: Mapping[Any, str], class_names: list[str]) -> list[str]:
    """The word of each class. Keys are all classes' names, or all numbers."""
    if not isinstance(verbalizer, Mapping) or not all(isinstance(word, str) and word for word in verbalizer.values()):
        raise ConfigurationError(
            f"verbalizer is {verbalizer}: it must map each class to a word, e.g. 0 to ' bad' and 1 to ' great'"
        )
    by_name = {str(label): word for label, word in verbalizer.items()}
    numbers = [str(number) for number in range(len(class_names))]
    orders = [order for order in (class_names, numbers) if set(order) == set(by_name)]
    if not orders or len(by_name) < len(verbalizer):
        raise ConfigurationError(
            f"verbalizer has the classes {', '.join(map(str, verbalizer))}, the data have {', '.join(class_names)}: "
            "give each of them a word, by name or by number from 0"
        )
    if len({tuple(order) for order in orders}) > 1:
        raise ConfigurationError(
            f"verbalizer has the classes {', '.join(by_name)}, which are names and numbers in different orders "
            f"({', '.join(class_names)}): name the classes by words in the data"
        )
    return [by_name[label] for label in orders[0]]


def _tokens_of(words: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token [C] of each word.

    Raises:
        ConfigurationError: a word is not one known token, or two are the same.
    """
    tokens: list[int] = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "none"
            raise ConfigurationError(
                f"verbalizer: {word!r} must be one token of {tokenizer.name_or_path!r}, and is {pieces}: "
                "choose another word, or write it with or without a space in front"
            )
        if ids[0] in tokens:
            same = words[tokens.index(ids[0])]
            raise ConfigurationError(f"verbalizer: {same!r} and {word!r} are the same token: give each class its own")
        tokens.append(ids[0])
    return torch.tensor(tokens)
