"""Parameters that are trained before and inside frozen blocks: ptune, deep_ptune and prefix prompts.

Shapes: P virtual tokens (`pre_seq_len`), L blocks, H hidden size; of a block h heads, D and E sizes of key and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import nn

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf.past_shapes import PastShape
from petals_lightning.protocol.adapters import PastKeyValues, by_block

TuningMode = Literal["ptune", "deep_ptune", "prefix", "lora"]
TUNING_MODES: tuple[TuningMode, ...] = get_args(TuningMode)
PROMPT_MODES: tuple[TuningMode, ...] = ("ptune", "deep_ptune", "prefix")
"""Those with virtual tokens."""


class Prompts(nn.Module):
    """Virtual tokens before the input.

    With `ptune` they have trained embeddings; with `deep_ptune` also vectors for every block, added to their hidden
    states. With `prefix` nothing runs for them: each block has trained keys and values in their place.

    Attributes:
        input: [P, E] float32, in place of token embeddings (their width E is H in nearly all families); None with
            `prefix`.
        deep: [L, P, H] float32, added to the prefix's hidden states before block i; None without `deep_ptune`.
        past: keys and values of all blocks, one part for each shape that occurs; None without `prefix`.
        is_off: passes are made without them; see `without_tuning`.

    Args:
        tuning_mode: "ptune", "deep_ptune" or "prefix".
        pre_seq_len: P > 0.
        embedding_size: E.
        hidden_size: H.
        num_blocks: L.
        past_shapes: with "prefix", what each block keeps of a position.

    Raises:
        ConfigurationError: unknown mode, or `pre_seq_len` below 1.
    """

    input: nn.Parameter | None
    deep: nn.Parameter | None
    past: nn.ModuleList | None

    def __init__(
        self,
        tuning_mode: TuningMode,
        pre_seq_len: int,
        *,
        embedding_size: int,
        hidden_size: int,
        num_blocks: int,
        past_shapes: Mapping[int, PastShape] | None = None,
    ):
        super().__init__()
        check_tuning(tuning_mode, pre_seq_len)
        self.is_off = False
        self.tuning_mode, self.pre_seq_len = tuning_mode, pre_seq_len
        self.input = self.deep = self.past = None
        if tuning_mode == "prefix":
            assert past_shapes is not None, "found when the model is loaded"
            zeros = {
                block: (torch.zeros(heads, pre_seq_len, key_size), torch.zeros(heads, pre_seq_len, value_size))
                for block, (heads, key_size, value_size) in past_shapes.items()
            }
            self.past = nn.ModuleList(_PastPart(part) for part in PastKeyValues.grouped(zeros))
            return
        self.input = nn.Parameter(torch.zeros(pre_seq_len, embedding_size, dtype=torch.float32))
        if tuning_mode == "deep_ptune":
            self.deep = nn.Parameter(torch.zeros(num_blocks, pre_seq_len, hidden_size, dtype=torch.float32))

    def reset_parameters(self, start: torch.Tensor) -> None:
        """Sets `input` to `start` [P, E] (see `PromptStart`), and `deep` to zero, as ptune."""
        assert self.input is not None, "a prefix is set by `set_past`"
        with torch.no_grad():
            self.input.copy_(start)
            if self.deep is not None:
                self.deep.zero_()

    def past_parts(self) -> tuple[PastKeyValues, ...]:
        """The prefix's keys and values as servers take them; empty without `prefix`."""
        return tuple(PastKeyValues(part.blocks, part.keys, part.values) for part in self.past or ())  # type: ignore[arg-type]

    def past_by_block(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The prefix's keys [h, P, D] and values [h, P, E] in each block, in order."""
        return by_block(self.past_parts())

    @torch.no_grad()
    def set_past(self, of_block: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sets the prefix's keys [h, P, D] and values [h, P, E] of each block, in order."""
        for own, given in zip(self.past_by_block(), of_block, strict=True):
            for parameter, value in zip(own, given, strict=True):
                parameter.copy_(value)

    def keep_first(self) -> None:
        """Leaves the prefix's first position untrained from now on: its gradients are 0.

        A trained model spends attention that it does not need on the first position, so a small change there moves
        every token in every block.
        """
        for part in self.past or ():
            for parameter in part.parameters():
                parameter.register_hook(_without_first)

    def flat_past(self) -> torch.Tensor:
        """The prefix as PEFT stores it, [P, sum of h·(D + E)]: keys, then values, of each block."""
        pairs = (tensor for pair in self.past_by_block() for tensor in pair)
        return torch.cat([tensor.transpose(0, 1).flatten(1) for tensor in pairs], dim=1)

    def set_flat_past(self, flat: torch.Tensor) -> None:
        """Sets the prefix from what `flat_past` returns."""
        own = self.past_by_block()
        parts = iter(flat.split([tensor.shape[0] * tensor.shape[2] for pair in own for tensor in pair], dim=1))
        shaped = [
            tuple(next(parts).unflatten(1, (tensor.shape[0], tensor.shape[2])).transpose(0, 1) for tensor in pair)
            for pair in own
        ]
        self.set_past([(keys, values) for keys, values in shaped])

    def extra_repr(self) -> str:
        return f"tuning_mode={self.tuning_mode!r}, pre_seq_len={self.pre_seq_len}"


def _without_first(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[:, :, 0] = 0
    return gradient


class _PastPart(nn.Module):
    """Keys [m, h, P, D] and values [m, h, P, E] of m blocks, float32."""

    def __init__(self, start: PastKeyValues):
        super().__init__()
        self.blocks = start.blocks
        self.keys, self.values = nn.Parameter(start.keys), nn.Parameter(start.values)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, heads={self.keys.shape[1]}"


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
