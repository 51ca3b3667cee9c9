"""What makes steps cheap changes no result: kept graphs, prompts sent once, micro-batches, rows, 16-bit wire."""

from __future__ import annotations

import pytest
import torch

from petals_lightning.client import ClientConfig
from petals_lightning.models import (
    AutoDistributedModel,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.local import LocalModelForSequenceClassification
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.span import BlockSpan
from tests.helpers.families import HIDDEN
from tests.helpers.parity import assert_same_gradients, pair, right_padded_batch
from tests.helpers.requests import micro_batches

CLASSIFIERS = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.loss.item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [ServerLimits(graph_bytes=0), ServerLimits(graph_lifetime=0.0)],
    ids=["no room for graphs", "graphs expire at once"],
)
def test_a_graph_that_is_gone_is_computed_again(limits, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 1), (1, 4)], limits=limits)
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3)
    for seed in range(2):
        batch = right_padded_batch(seed)
        assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-5)
        assert_same_gradients(remote, local, 1e-5)


def test_a_prefix_that_is_run_with_every_sample_gives_the_same(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 4)], share_prefix=False)
    assert not swarm.servers[0].span.share_prefix
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3)
    batch = right_padded_batch()
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


@pytest.mark.slow
@pytest.mark.ours("they keep no graphs, and so no prefix")
def test_a_step_runs_its_prefix_once_on_every_server(tiny_checkpoint, start_swarm, monkeypatch):
    checkpoint, runs = tiny_checkpoint("llama"), []
    swarm = start_swarm(checkpoint, [(0, 1), (1, 4)])
    config = ClientConfig(max_microbatch_tokens=24)  # two samples of nine tokens behind three virtual ones
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3, client_config=config)
    run_prefix = BlockSpan.run_prefix
    monkeypatch.setattr(BlockSpan, "run_prefix", lambda *args: runs.append(args) or run_prefix(*args))
    for seed in range(2):  # the second step has other prompts
        batch = right_padded_batch(seed, batch=7)
        assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-5)
        assert_same_gradients(remote, local, 1e-5)
        assert len(runs) == 2 * (seed + 1)
        for model in (remote, local):
            with torch.no_grad():
                prompts_of(model).deep += 0.1


def test_backward_twice_gives_twice_the_gradient(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    model = swarm.load(CLASSIFIERS[0], tuning_mode="ptune", pre_seq_len=2, num_labels=3)
    loss = model(**right_padded_batch()).loss
    loss.backward(retain_graph=True)
    once = prompts_of(model).input.grad.clone()
    loss.backward()
    assert torch.allclose(prompts_of(model).input.grad, 2 * once, rtol=1e-4)


@pytest.mark.slow
def test_micro_batches_give_the_gradients_of_the_whole_batch(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("mixtral")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)])
    config = ClientConfig(max_microbatch_tokens=24)  # two samples of nine tokens behind three virtual ones
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3, client_config=config)
    batch = right_padded_batch(batch=7)
    assert step(remote, batch) == pytest.approx(step(local, batch), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)
    assert (
        remote_blocks(remote).stats.handovers == 2 * 4
    )  # forward and backward, through both servers, four micro-batches


@pytest.mark.slow
@pytest.mark.parametrize(("spans", "is_cut"), [([(0, 4)], False), ([(0, 2), (2, 4)], True)])
def test_a_chain_is_filled_with_micro_batches(spans, is_cut, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, spans)
    remote, local = pair(*CLASSIFIERS, checkpoint, swarm, "deep_ptune", num_labels=3)
    batch = right_padded_batch(batch=16, length=30)
    for connection in remote_blocks(remote)._swarm.servers._connections.values():
        connection.round_trip = 0.001
    loss = remote(**batch).loss
    assert (micro_batches(loss) > 1) == is_cut
    loss.backward()
    assert loss.item() == pytest.approx(step(local, batch), rel=1e-5)
    assert_same_gradients(remote, local, 1e-5)


@pytest.mark.slow
def test_a_batch_beyond_the_servers_limits_is_cut_and_queued_to_fit(tiny_checkpoint, start_swarm):
    limits = ServerLimits(max_batch_tokens=20, max_open_requests=4, max_message_bytes=8192)
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], limits=limits)
    layers = swarm.load(AutoDistributedModel).layers
    hidden = torch.randn(40, 7, HIDDEN, requires_grad=True)
    out = layers(hidden)
    out.sum().backward()
    assert layers.stats.retries == 0
    assert layers.stats.requests == 2 * 20  # two samples a request, forward and backward
    assert torch.allclose(out[38:], layers(hidden[38:]), atol=1e-5)
    assert hidden.grad is not None
    assert hidden.grad[-1].abs().sum() > 0


def test_unchanged_prompts_travel_once(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    model = swarm.load(CLASSIFIERS[0], tuning_mode="deep_ptune", pre_seq_len=16, num_labels=3)
    stats, sent = remote_blocks(model).stats, []
    for change in (False, False, True):
        if change:
            with torch.no_grad():
                prompts_of(model).deep.add_(1)
        before = stats.bytes_sent
        with torch.no_grad():
            model(**right_padded_batch())
        sent.append(stats.bytes_sent - before)
    prompts_bytes = prompts_of(model).deep.numel() * 4
    assert sent[0] - sent[1] == pytest.approx(prompts_bytes, abs=100)
    assert sent[2] == pytest.approx(sent[0], abs=100)


def test_only_the_rows_that_are_read_come_back(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    model = swarm.load(CLASSIFIERS[0], num_labels=3)
    batch = right_padded_batch(batch=8, length=30)
    stats = remote_blocks(model).stats
    before = stats.bytes_received
    with torch.no_grad():
        model(**batch)
    assert stats.bytes_received - before < 8 * HIDDEN * 4 + 500  # one row a sample, and the header


def test_samples_of_which_nothing_is_read_are_not_run(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    layers = swarm.load(AutoDistributedModel, client_config=ClientConfig(max_microbatch_tokens=6)).layers
    hidden = torch.randn(3, 6, HIDDEN, requires_grad=True)
    whole, _ = layers.run(hidden)
    before = layers.stats.requests
    out, _ = layers.run(hidden, rows=torch.tensor([13, 17]))
    assert layers.stats.requests == before + 1
    assert torch.allclose(out, whole.reshape(18, HIDDEN)[[13, 17]], atol=1e-5)
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:2].abs().sum() == 0
    assert hidden.grad[2].abs().sum() > 0
