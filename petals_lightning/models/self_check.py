"""Tests a model's own ends at load: what this package assumes of its family must hold.

The blocks are skipped, so that their output is their input, and two ways to the same result are compared. This takes
milliseconds for a small model, a second for a large vocabulary. A model that differs is refused, since its numbers
would be wrong.

Shapes: B batch, S tokens, E embedding width, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from petals_lightning.errors import UnsupportedModelError
from petals_lightning.hf.compat import quiet_transformers, versions
from petals_lightning.hf.pruning import vocabulary_size
from petals_lightning.models.bridge import DecoderBridge
from petals_lightning.models.reading import token_logits

_TOKENS = 5


class _IdentitySession:
    """An `InferenceSession` that skips the blocks."""

    def __init__(self, max_length: int):
        self.max_length, self.position = max_length, 0

    def step(self, hidden_states: torch.Tensor, *, keep: int = 0, **padding: Any) -> torch.Tensor:
        self.position += hidden_states.shape[1]
        return hidden_states[:, -keep:]

    def close(self) -> None:
        """Holds nothing."""


@torch.no_grad()
def check_ends(model: Any, bridge: DecoderBridge, family: type[PreTrainedModel]) -> None:
    """Tests embeddings, positions and head of a distributed model.

    Args:
        family: the model's own class, without our mixins.

    Raises:
        UnsupportedModelError: they give another result here than in the family's own code.
    """
    try:
        _check_positions(model, bridge)
        with quiet_transformers(), bridge.without_blocks(_IdentitySession):  # type: ignore[arg-type]
            if model.can_generate():
                _check_logits(model)
                _check_generate(model)
            elif model.base_model is not model:
                _check_classifier(model, family)
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, NotImplementedError) as e:
        reason = f"{type(e).__name__}: {e}".strip().splitlines()[0]
        raise UnsupportedModelError(_refusal(model, f"its embeddings and head do not run alone ({reason})")) from e


def _check_positions(model: PreTrainedModel, bridge: DecoderBridge) -> None:
    """Tokens that follow other tokens, as after a prefix, must have the same positions as in one sequence."""
    table: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, _TOKENS, table.shape[1], generator=generator).to(table)
    first = 2
    whole = bridge.first_block_input(embeds)[:, first:]
    behind = bridge.first_block_input(embeds[:, first:], first)
    _compare(model, "the positions of tokens that follow a prefix", behind, whole)
    if not model.can_generate():
        return
    mask = torch.ones(1, _TOKENS, dtype=torch.long, device=table.device)
    mask[:, :first] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    last = slice(_TOKENS - 1, None)
    whole = bridge.first_block_input(embeds, attention_mask=mask, position_ids=positions)[:, last]
    step = bridge.first_block_input(embeds[:, last], _TOKENS - 1, attention_mask=mask, position_ids=positions[:, last])
    _compare(model, "the positions of tokens that follow padding", step, whole)


def _check_logits(model: Any) -> None:
    """Logits of chosen positions must equal those of a full pass."""
    tokens = _tokens(model, 2)
    logits = model(input_ids=tokens).logits
    rows = torch.tensor([1, 2 * _TOKENS - 1], device=tokens.device)
    _compare(model, "the head", token_logits(model, tokens, rows), logits.flatten(0, 1)[rows])


def _check_generate(model: Any) -> None:
    """Each step of `generate` must have the logits of a pass over all tokens at once."""
    tokens, new = _tokens(model, 1), 2
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        num_beams=1, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    whole = model(input_ids=generated.sequences[:, :-1]).logits[:, -new:]
    _compare(model, "what generate computes", torch.stack(generated.logits, dim=1), whole.float())


def _check_classifier(model: Any, family: type[PreTrainedModel]) -> None:
    """The head must read the fetched position, and no other."""
    if not hasattr(model, "score"):
        raise UnsupportedModelError(
            f"{family.__name__} ({model.config.model_type}) classifies with a head of its own, not by a `score` of the "
            "last token: use a family that does, or tune it as a language model"
        )
    pad = model.config.get_text_config().pad_token_id
    tokens = _tokens(model, 2 if pad is not None else 1)
    if pad is not None:
        tokens[tokens == pad] = 0 if pad != 0 else 1
        tokens[0, -2:] = pad
    whole = family.forward(model, input_ids=tokens).logits
    _compare(model, "the position that is classified", model(input_ids=tokens).logits, whole)


def _tokens(model: PreTrainedModel, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary_size(model), (batch, _TOKENS), generator=generator).to(model.device)


def _compare(model: PreTrainedModel, what: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    same_shape = result.shape == expected.shape
    error = (result - expected).float().norm() / expected.float().norm().clamp_min(1e-12) if same_shape else torch.inf
    if not error < tolerance:
        raise UnsupportedModelError(_refusal(model, f"{what} would be wrong here (off by {float(error):.0%})"))


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return (
        f"{type(model).__name__} ({model.config.model_type}) of {versions()} does not go together with remote blocks: "
        f"{reason}. Use a version of transformers that this package was tested with (docs/dependencies.md), or report "
        "the family"
    )
