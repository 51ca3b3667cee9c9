"""Labelled texts and dialogues from anywhere, as batches that waste little on padding."""

from petals_lightning.data.dialogues import DialogueDataModule
from petals_lightning.data.text_classification import TextClassificationDataModule
from petals_lightning.data.tokenizers import load_tokenizer

__all__ = ["DialogueDataModule", "TextClassificationDataModule", "load_tokenizer"]
