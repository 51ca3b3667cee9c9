"""Labelled texts, dialogues and plain texts from many sources, as batches with little padding."""

from petals_lightning.data.base import TextDataModule
from petals_lightning.data.dialogues import DialogueDataModule
from petals_lightning.data.plain_text import PlainTextDataModule
from petals_lightning.data.preferences import PreferenceDataModule
from petals_lightning.data.text_classification import TextClassificationDataModule
from petals_lightning.data.text_targets import TextLabelSetDataModule, TextNumberDataModule
from petals_lightning.hf.tokenizer import load_tokenizer

__all__ = [
    "DialogueDataModule",
    "PlainTextDataModule",
    "PreferenceDataModule",
    "TextClassificationDataModule",
    "TextDataModule",
    "TextLabelSetDataModule",
    "TextNumberDataModule",
    "load_tokenizer",
]
