"""Limits of a model's context: rotary embeddings that depend on the sequence's length, and sliding windows.

Such rotary embeddings change for earlier positions when the sequence grows. `longrope` (Phi-3) uses other factors for
all positions once there are more than in pretraining. `dynamic` (NTK) uses other factors for every length beyond
`max_position_embeddings`. Keys computed before are then wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from petals_lightning.errors import ProtocolError


@dataclass(frozen=True)
class RotaryLimit:
    """The length up to which rotary embeddings do not depend on the length of the sequence.

    Attributes:
        positions: up to this number, prefix included, a position's embedding does not depend on the length.
        rope_type: transformers' name of the kind.
        has_one_long_form: whether beyond this number there is one other form, for all lengths.
    """

    positions: int
    rope_type: str
    has_one_long_form: bool

    def uses_long_factors(self, positions: int) -> bool:
        """Whether a sequence of `positions` positions has the form beyond the limit.

        Raises:
            ProtocolError: the form beyond the limit changes with the length.
        """
        if positions > self.positions and not self.has_one_long_form:
            raise ProtocolError(
                f"{positions} positions (virtual tokens counted): with this model's rope_type {self.rope_type!r} all "
                f"embeddings change with each length beyond {self.positions}, which shared servers cannot follow; "
                f"keep to {self.positions}"
            )
        return positions > self.positions


def rotary_limit(config: PreTrainedConfig) -> RotaryLimit | None:
    """The limit beyond which a model's rotary embeddings depend on the length; None if they never do."""
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


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The shortest reach of attention in any block, in positions, padding counted; None if all are unlimited.

    Families call it `sliding_window`, `window_size`, `attention_window_size`, …; the shortest one counts.
    """
    text = config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) == {"full_attention"}:
        return None
    lengths = [value for name, value in vars(text).items() if type(value) is int and value > 0 and _is_window(name)]
    return min(lengths, default=None)


def _is_window(name: str) -> bool:
    if name in ("attention_chunk_size", "local_attention"):
        return True
    return "window" in name and not any(other in name for other in ("layer", "pattern"))
