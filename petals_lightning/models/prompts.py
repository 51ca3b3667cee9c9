"""Parameters that are trained before and inside frozen blocks: ptune and deep_ptune prompts.

Shapes: P virtual tokens (`pre_seq_len`), L blocks, H hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from petals_lightning.errors import ConfigurationError

TuningMode = Literal["ptune", "deep_ptune", "lora"]
TUNING_MODES: tuple[TuningMode, ...] = get_args(TuningMode)
PROMPT_MODES: tuple[TuningMode, ...] = ("ptune", "deep_ptune")
"""Those with virtual tokens."""


class Prompts(nn.Module):
    """Virtual tokens before the input and, with `deep_ptune`, vectors for every block, added to their hidden states.

    Attributes:
        input: [P, E] float32, in place of token embeddings (their width E is H in nearly all families).
        deep: [L, P, H] float32, added to the prefix's hidden states before block i; None with `ptune`.
        is_off: passes are made without them; see `without_tuning`.

    Args:
        tuning_mode: "ptune" or "deep_ptune".
        pre_seq_len: P > 0.
        embedding_size: E.
        hidden_size: H.
        num_blocks: L.

    Raises:
        ConfigurationError: unknown mode, or `pre_seq_len` below 1.
    """

    def __init__(
        self, tuning_mode: TuningMode, pre_seq_len: int, *, embedding_size: int, hidden_size: int, num_blocks: int
    ):
        super().__init__()
        check_tuning(tuning_mode, pre_seq_len)
        self.is_off = False
        self.tuning_mode, self.pre_seq_len = tuning_mode, pre_seq_len
        self.input = nn.Parameter(torch.zeros(pre_seq_len, embedding_size, dtype=torch.float32))
        deep = torch.zeros(num_blocks, pre_seq_len, hidden_size, dtype=torch.float32)
        self.deep = nn.Parameter(deep) if tuning_mode == "deep_ptune" else None

    def reset_parameters(self, start: torch.Tensor) -> None:
        """Sets `input` to `start` [P, E] (see `PromptStart`), and `deep` to zero, as ptune."""
        with torch.no_grad():
            self.input.copy_(start)
            if self.deep is not None:
                self.deep.zero_()

    def extra_repr(self) -> str:
        return f"tuning_mode={self.tuning_mode!r}, pre_seq_len={self.pre_seq_len}"


def check_tuning(tuning_mode: str | None, pre_seq_len: int | None) -> None:
    """Raises ConfigurationError unless the mode is known (or None) and P is valid for it."""
    if tuning_mode in (None, "lora"):
        return
    if tuning_mode not in TUNING_MODES:
        raise ConfigurationError(
            f"tuning_mode is {tuning_mode!r}: it must be one of {', '.join(TUNING_MODES)}, or None for a head alone"
        )
    if not isinstance(pre_seq_len, int) or pre_seq_len < 1:
        raise ConfigurationError(
            f"pre_seq_len is {pre_seq_len!r}: {tuning_mode} needs a whole number of virtual tokens above 0, e.g. 16"
        )
