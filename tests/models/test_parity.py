"""The first test of every feature: through a real 2-server swarm, results are those of plain local Hugging Face."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from petals_lightning.client import ClientConfig, RemoteSequential
from petals_lightning.models import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.local import LocalModel, LocalModelForCausalLM, LocalModelForSequenceClassification
from tests.helpers.families import CAUSAL_ONLY, HIDDEN, NUM_BLOCKS, RECURRENT_CONFIGS, TINY_CONFIGS
from tests.helpers.parity import UNEVEN, P, assert_same_gradients, loss_trace, pair, right_padded_batch
from tools.testing.swarms import PREFIX
from tools.testing.tensors import relative_error

MODES = [None, "ptune", "deep_ptune"]


@pytest.mark.also_on("petals")
@pytest.mark.also_on("split", family=("llama", "bloom", "gemma3"))
@pytest.mark.also_on("mixed", family=("llama", "bloom", "falcon", "mixtral", "gpt2"))
@pytest.mark.parametrize("family", [*TINY_CONFIGS, *RECURRENT_CONFIGS])
def test_every_family_equals_local_hugging_face(family, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, UNEVEN)
    batch = right_padded_batch()
    classes: tuple[Any, Any]
    for mode in MODES:
        if family not in CAUSAL_ONLY:
            classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
            remote, local = pair(*classes, checkpoint, swarm, mode, num_labels=3)
            outputs = []
            for model in (remote, local):
                output = model(**batch)
                output.loss.backward()
                outputs.append(output)
            assert relative_error(outputs[0].logits, outputs[1].logits) < 1e-5
            assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-5)
            assert_same_gradients(remote, local, 1e-5)
        classes = AutoDistributedModelForCausalLM, LocalModelForCausalLM
        remote, local = pair(*classes, checkpoint, swarm, mode)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits, expected = remote(**inputs).logits, local(**inputs).logits
        real = batch["attention_mask"].bool()
        if mode is not None:
            expected = expected[:, -logits.shape[1] :]
        assert relative_error(logits[real], expected[real]) < 1e-5
    assert type(remote_blocks(remote)) is RemoteSequential


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed")
@pytest.mark.parametrize("mode", MODES)
def test_twenty_training_steps_give_the_local_losses(mode, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, UNEVEN)
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    losses = []
    for model in pair(*classes, checkpoint, swarm, mode, num_labels=3):
        losses.append(loss_trace(model, lambda model, batch: model(**batch).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.98 * losses[0][1], "the test is blind: nothing was learnt"


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed")
def test_bfloat16_stays_within_its_rounding(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, UNEVEN, dtype="bfloat16")
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    batch = right_padded_batch()
    remote, local16 = pair(*classes, checkpoint, swarm, "deep_ptune", num_labels=3, dtype="bfloat16")
    _, local32 = pair(*classes, checkpoint, swarm, "deep_ptune", num_labels=3, dtype="float32")
    for model in (remote, local16, local32):
        model(**batch).loss.backward()
    deep = [prompts_of(model).deep.grad for model in (remote, local16, local32)]
    assert deep[0].dtype == torch.float32
    rounding = relative_error(deep[1], deep[2])  # what bfloat16 does to the local gradient
    assert 1e-4 < rounding < 0.2
    assert relative_error(deep[0], deep[2]) < 2 * rounding
    sent = remote_blocks(remote).stats.bytes_sent
    in_float32 = swarm.load(
        AutoDistributedModelForSequenceClassification, tuning_mode="deep_ptune", pre_seq_len=P, num_labels=3,
        client_config=ClientConfig(wire_dtype="float32"),
    )  # fmt: skip
    in_float32(**batch).loss.backward()
    assert sent < 0.65 * remote_blocks(in_float32).stats.bytes_sent


@pytest.mark.slow
@pytest.mark.also_on("petals", "mixed")
def test_a_slice_of_remote_blocks_has_the_gradients_of_those_blocks(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)])
    remote, local = pair(AutoDistributedModel, LocalModel, checkpoint, swarm, None)
    assert len(remote.layers) == NUM_BLOCKS
    assert repr(remote.layers[1:3]) == f"RemoteSequential(blocks 1:3 of '{PREFIX}' (4 blocks, in a swarm))"
    hidden = torch.randn(2, 6, HIDDEN)
    got, wanted = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = remote.layers[1:3](got)
    expected, positions = wanted, torch.arange(6)[None]
    for block in local.layers[1:3]:
        rotary = local.rotary_emb(expected, position_ids=positions)
        expected = block(expected, position_embeddings=rotary, position_ids=positions)
    assert relative_error(out, expected) < 1e-5
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert got.grad is not None
    assert wanted.grad is not None
    assert relative_error(got.grad, wanted.grad) < 1e-5


def test_the_local_reference_is_plain_hugging_face(tiny_checkpoint):
    """The other side of all these tests, checked against code that knows nothing of this package."""
    checkpoint, batch = tiny_checkpoint("llama"), right_padded_batch()
    torch.manual_seed(0)
    ours = LocalModelForSequenceClassification.from_pretrained(
        str(checkpoint), tuning_mode="deep_ptune", pre_seq_len=P, num_labels=3
    )
    prompts = prompts_of(ours)
    with torch.no_grad():
        prompts.deep.normal_(0, 0.3)
    plain = AutoModelForSequenceClassification.from_pretrained(str(checkpoint), num_labels=3)
    plain.score.load_state_dict({"weight": ours.score.weight})
    hidden = torch.cat([prompts.input.expand(5, -1, -1), plain.model.embed_tokens(batch["input_ids"])], dim=1)
    positions = torch.arange(hidden.shape[1])[None]
    for deep, block in zip(prompts.deep, plain.model.layers, strict=True):
        hidden = torch.cat([hidden[:, :P] + deep, hidden[:, P:]], dim=1)
        rotary = plain.model.rotary_emb(hidden, position_ids=positions)
        hidden = block(hidden, position_embeddings=rotary, position_ids=positions)
    last = P + batch["attention_mask"].sum(1) - 1
    logits = plain.score(plain.model.norm(hidden))[torch.arange(5), last]
    assert relative_error(ours(**batch).logits, logits) < 1e-5
