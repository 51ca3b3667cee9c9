"""A Petals training script runs after its import line is changed."""

from __future__ import annotations

import hivemind
import pytest
import torch

from petals_lightning.models import (
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
    trainable_state_dict,
)
from tests.helpers.parity import right_padded_batch
from tools.testing.swarms import PREFIX


@pytest.mark.slow
def test_the_sst2_notebooks_loop_trains_under_fp16_autocast(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("bloom"), [(0, 1), (1, 4)])
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        str(tiny_checkpoint("bloom")), initial_peers=swarm.initial_peers, dht_prefix=PREFIX, tuning_mode="deep_ptune",
        pre_seq_len=4, num_labels=3, torch_dtype=torch.float32,
    )  # fmt: skip
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu")
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        losses = []
        model.train()
        for _ in range(12):
            batch = right_padded_batch()
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert all(p.dtype == torch.float32 for p in trainable_state_dict(model).values())
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert parameter.grad is None
                assert torch.equal(parameter, frozen[name])
    finally:
        remote_blocks(model).close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning")  # hivemind 1.1.12, when it starts p2pd
def test_a_callers_own_hivemind_dht_is_a_way_into_the_swarm(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    dht = hivemind.DHT(initial_peers=swarm.initial_peers, start=True)
    try:
        model = swarm.load(
            AutoDistributedModelForSequenceClassification, initial_peers=None, dht=dht, tuning_mode="ptune",
            pre_seq_len=2, num_labels=3,
        )  # fmt: skip
        model(**right_padded_batch()).loss.backward()
        assert prompts_of(model).input.grad.abs().sum() > 0
    finally:
        dht.shutdown()
