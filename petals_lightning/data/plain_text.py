"""The DataModule for plain texts: language modelling on all tokens.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from petals_lightning.data.base import Splits, TextDataModule
from petals_lightning.data.collate import LabelledTokens, PadLabelled
from petals_lightning.data.columns import find_text_column
from petals_lightning.data.sources import BUNDLED
from petals_lightning.errors import DataError


class PlainTextDataModule(TextDataModule):
    """Batches `{"input_ids", "attention_mask", "labels"}`, each [B, S]; every token is a label.

    The texts of a split are joined to one stream of tokens, with the tokenizer's eos after each text, and the stream is
    split into windows of `max_length` tokens. A .txt file is one text. If there is no validation part, it consists of
    the last windows of the training part.

    Args:
        tokenizer: the model's hub id or folder.
        source: `bundled`, or texts from elsewhere; see `TextDataModule`.
        text_column: None finds it by name.
        options: as for `TextDataModule`.

    Raises (besides what `TextDataModule` raises, in `setup`):
        DataError: there is no text column, or there are too few tokens.
    """

    real_data = "data=text data.source=PATH"

    def __init__(
        self,
        tokenizer: str,
        source: str = BUNDLED,
        *,
        text_column: str | None = None,
        max_length: int = 256,
        batch_size: int = 16,
        **options: Any,
    ):
        super().__init__(tokenizer, source, max_length=max_length, batch_size=batch_size, **options)
        self.text_column = text_column

    def encoded(self, raw: Splits, tokenizer: PreTrainedTokenizerBase) -> dict[str, LabelledTokens]:
        column = find_text_column(raw["train"], self.text_column, where=f"train of {self.source}")
        cut = {
            split: chunk_tokens(
                rows[find_text_column(rows, column, where=f"{split} of {self.source}")][:], tokenizer, self.max_length
            )
            for split, rows in raw.items()
        }
        if "validation" not in cut:
            held_out = max(round(self.validation_fraction * len(cut["train"])), 1)
            cut["train"], cut["validation"] = cut["train"][:-held_out], cut["train"][-held_out:]
        for split, samples in cut.items():
            if not samples:
                raise DataError(
                    f"{split} of {self.source} has too few tokens for windows of max_length={self.max_length}: "
                    "use a smaller one, or more text"
                )
        return {split: LabelledTokens([(ids, ids) for ids in samples]) for split, samples in cut.items()}

    def collate(self, pad_token_id: int) -> PadLabelled:
        return PadLabelled(pad_token_id)

    @property
    def description(self) -> str:
        return f"windows of {self.max_length} tokens"


def chunk_tokens(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of all texts, each with the tokenizer's special tokens and a final eos, in windows of `max_length`.

    The last window may be shorter, and is left out if it has nothing to predict. Rows without a text are left out.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for text in texts:
        if text:
            ids = tokenizer(text, verbose=False)["input_ids"]  # a text may be longer than the model's limit
            stream += ids + (end if ids[-1:] != end else [])
    pieces = [stream[at : at + max_length] for at in range(0, len(stream), max_length)]
    return [piece for piece in pieces if len(piece) > 1]
