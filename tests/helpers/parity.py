"""Comparison of a distributed model with the local one: same weights, same batch, same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from petals_lightning.models import prompts_of, trainable_state_dict
from tests.helpers.families import VOCAB
from tools.testing.tensors import relative_error

P = 3
"""Virtual tokens of the tests' prompts."""
UNEVEN = [(0, 1), (1, 4)]
"""Blocks of two servers."""


def right_padded_batch(seed: int = 0, batch: int = 5, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids [B, S] with 0 as padding on the right, mask, and labels of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    lengths = torch.randint(2, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    labels = torch.randint(0, 3, (batch,), generator=generator)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}


def pair(auto, local, checkpoint, swarm, mode, client_config=None, **options):
    """The distributed and the local model with the same start; deep prompts are moved off zero."""
    options |= {"tuning_mode": mode, "pre_seq_len": P if mode else None}
    models = []
    for load in (
        lambda: swarm.load(auto, shared_peer=True, client_config=client_config, **options),
        lambda: local.from_pretrained(str(checkpoint), **options),
    ):
        torch.manual_seed(1)
        models.append(load().train())
        if mode == "deep_ptune":
            with torch.no_grad():
                prompts_of(models[-1]).deep.normal_(0, 0.3)
    return models


def assert_same_gradients(remote: torch.nn.Module, local: torch.nn.Module, tolerance: float) -> None:
    expected = {name: parameter.grad for name, parameter in local.named_parameters() if parameter.grad is not None}
    got = {name: parameter.grad for name, parameter in remote.named_parameters() if parameter.grad is not None}
    assert set(got) == set(expected) == set(trainable_state_dict(local))
    for name, grad in expected.items():
        assert grad.norm() > 1e-6, f"the test is blind: no gradient reaches {name}"
        assert relative_error(got[name], grad) < tolerance, name


def loss_trace(model: Any, loss_of: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]) -> list[float]:
    """The losses of twenty steps of AdamW, on two batches by turns."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    trace = []
    for step in range(20):
        loss = loss_of(model, right_padded_batch(step % 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trace.append(loss.item())
    return trace
