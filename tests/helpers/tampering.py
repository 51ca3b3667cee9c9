"""A classifier through servers some of which answer wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.server.running_server import RunningServer
from tools.testing.swarms import InProcessSwarm

BATCH = {"input_ids": torch.arange(1, 25).view(4, 6), "labels": torch.tensor([0, 1, 1, 0])}
OPTIONS: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 2, "num_labels": 2}
"""Of the classifier, and of the local one that it is compared with."""


def load_classifier(swarm: InProcessSwarm, **config: Any) -> Any:
    """The classifier; bans are short, so that a server comes back unless it was caught lying."""
    torch.manual_seed(0)
    settings = ClientConfig(**{"ban_period": 0.2, **config})
    return swarm.load(AutoDistributedModelForSequenceClassification, client_config=settings, **OPTIONS)


def tamper(server: RunningServer, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From now on the server answers `change(hidden)` in forwards, and gradients that follow from it."""
    span: Any = server.span
    honest = span.forward

    def forward(inputs: Any, *cached: Any) -> Any:
        hidden, prefix = honest(inputs, *cached)
        return change(hidden), prefix

    span.forward = forward


def chosen(model: Any, swarm: InProcessSwarm) -> RunningServer:
    """The server that the model uses now."""
    peer = remote_blocks(model).route(BATCH["input_ids"].numel())[0].peer_id
    return swarm.by_id[peer]


def assert_a_liar_is_found(step: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    """Steps until audits tell of a lie: until the tampered server is used, or audits another."""
    for _ in range(20):
        step()
        if "lies" in caplog.text:
            return
    pytest.fail("nobody found out")
