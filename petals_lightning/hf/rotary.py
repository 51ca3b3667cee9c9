"""Rotary embeddings that depend on how long a sequence is, so that its first positions change when it grows.

`longrope` (Phi-3) turns all positions by other factors as soon as there are more of them than in pretraining;
`dynamic` (NTK) by others for every length beyond `max_position_embeddings`. Keys that were made before are then wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from petals_lightning.errors import ProtocolError


@dataclass(frozen=True)
class RotaryLimit:
    """Up to where rotary embeddings do not depend on the length of the sequence.

    Attributes:
        positions: up to this many, prefix counted, embeddings of a position do not depend on the length.
        rope_type: as transformers calls it.
        has_one_form_beyond: whether they do not depend on it beyond that either, but are others.
    """

    positions: int
    rope_type: str
    has_one_form_beyond: bool

    def is_beyond(self, positions: int) -> bool:
        """Whether a sequence of so many positions has the form beyond the limit.

        Raises:
            ProtocolError: there is none that holds for longer sequences too.
        """
        if positions > self.positions and not self.has_one_form_beyond:
            raise ProtocolError(
                f"{positions} positions (virtual tokens counted): this model's rope_type {self.rope_type!r} turns all "
                f"positions anew for each length beyond {self.positions}, which shared servers cannot follow; keep to "
                f"{self.positions}"
            )
        return positions > self.positions


def rotary_limit(config: PreTrainedConfig) -> RotaryLimit | None:
    """Where a model's rotary embeddings begin to depend on the length; None if they never do."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [kind for kind in parameters.values() if kind]
    for kind in kinds:
        rope_type = kind.get("rope_type", "default")
        if rope_type == "longrope":
            return RotaryLimit(kind["original_max_position_embeddings"], rope_type, True)
        if "dynamic" in rope_type:
            return RotaryLimit(text.max_position_embeddings, rope_type, False)
    return None
