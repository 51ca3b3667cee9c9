"""What tests of inference sessions share."""

from __future__ import annotations

from typing import Any

import torch

from petals_lightning.protocol.adapters import Adapter
from tests.helpers.families import HIDDEN
from tests.helpers.parity import P
from tools.testing.tensors import relative_error

# Families whose `generate` is tested, and their steps with it; of the others only the steps are.
GENERATING = {
    "llama", "bloom", "falcon", "mixtral", "qwen3", "gemma3", "gpt_neox", "falcon_alibi", "mistral", "gpt2", "opt",
}  # fmt: skip


def random_prompts(num_blocks: int) -> dict[str, Any]:
    """`prefix` and `adapter`, as `RemoteSequential.run` and sessions take them."""
    return {
        "prefix": torch.randn(P, HIDDEN),
        "adapter": Adapter(0, num_blocks, 0.3 * torch.randn(num_blocks, P, HIDDEN)),
    }


def assert_steps_equal_one_forward(layers) -> None:
    hidden = torch.randn(2, 11, HIDDEN)
    for prompts in ({}, random_prompts(4)):
        expected, _ = layers.run(hidden, **prompts)
        with layers.inference_session(max_length=11, **prompts) as session:
            outputs = [session.step(piece) for piece in hidden.split([4, 1, 1, 3, 1, 1], dim=1)]
            assert session.position == 11
        assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-4
