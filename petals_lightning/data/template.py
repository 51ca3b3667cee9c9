"""Words around each text, after which a language model names its class: "{text} It was"."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from transformers import PreTrainedTokenizerBase

from petals_lightning.errors import ConfigurationError


class TextTemplate:
    """Puts texts into a template, and cuts texts that are too long, never the template.

    Args:
        template: has `{text}` once; literal braces are doubled, as in `str.format`.

    Raises:
        ConfigurationError: it has no `{text}`, or other fields.
    """

    def __init__(self, template: str):
        try:
            fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
            before, after = template.format(text="\0").split("\0") if fields == [["text", "", None]] else (None, None)
        except ValueError:
            before = after = None
        if before is None or after is None:
            raise ConfigurationError(
                f"template={template!r}: must have {{text}} once and no other field, e.g. '{{text}} It was'"
            )
        self._before, self._after = before, after

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids of each text in the template: at most `limit`, and none that the tokenizer adds at the end.

        The last token is thus the template's, or the text's if it ends the template. A text that is too long loses its
        last tokens.

        Raises:
            ConfigurationError: the template leaves no token for a text.
        """
        wholes = [self._before + text + self._after for text in texts]
        encoded = tokenizer(wholes, return_offsets_mapping=True, return_special_tokens_mask=True)
        samples = []
        for row, whole in enumerate(wholes):
            ids, spans = list(encoded["input_ids"][row]), encoded["offset_mapping"][row]
            while ids and encoded["special_tokens_mask"][row][len(ids) - 1]:
                ids.pop()
            start, end = len(self._before), len(whole) - len(self._after)
            of_text = [at for at, (first, last) in enumerate(spans[: len(ids)]) if start <= first < last <= end]
            excess = len(ids) - limit
            if excess > 0:
                if excess >= len(of_text):
                    raise ConfigurationError(
                        f"max_length={limit}: the template alone has {len(ids) - len(of_text)} tokens, so that none is "
                        "left for a text; set a larger max_length"
                    )
                del ids[of_text[-excess] : of_text[-1] + 1]
            samples.append(ids)
        return samples
