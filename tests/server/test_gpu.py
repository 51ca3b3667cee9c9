"""Servers that compute on a GPU, against plain Hugging Face on the CPU: copies beside kernels must not change a bit of
what they carry."""

from __future__ import annotations

import threading

import pytest
import torch

from petals_lightning.models import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from petals_lightning.server.blocks.transfers import Transfers
from tests.helpers.parity import assert_same_gradients, pair, right_padded_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3", "mixtral"])
def test_training_steps_are_those_of_the_cpu(family, mode, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, [(0, 1), (1, 4)], device=str(DEVICE))
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, local = pair(*classes, checkpoint, swarm, mode, num_labels=3)
    batch = right_padded_batch()
    for model in (remote, local):
        model(**batch).loss.backward()
    assert_same_gradients(remote, local, 1e-4)


def test_generation_gives_the_tokens_of_the_cpu(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 2), (2, 4)], device=str(DEVICE))
    models = pair(AutoDistributedModelForCausalLM, LocalModelForCausalLM, checkpoint, swarm, None)
    prompt = right_padded_batch()["input_ids"][:1]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    remote, local = (model.eval().generate(prompt, **options) for model in models)
    assert torch.equal(remote, local)


def test_requests_that_are_under_way_together_keep_their_own_results(tiny_checkpoint, start_swarm):
    """Memory of a tensor that has been copied must not be given away before its copy has ended."""
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 4)], device=str(DEVICE))
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, _ = pair(*classes, checkpoint, swarm, "deep_ptune", num_labels=3)
    batches = [right_padded_batch(seed, batch=2 + seed % 7, length=3 + seed % 11) for seed in range(24)]
    with torch.no_grad():
        alone = [remote(**batch).logits for batch in batches]
    together: list[torch.Tensor | None] = [None] * len(batches)

    def run(index: int) -> None:
        with torch.no_grad():
            together[index] = remote(**batches[index]).logits

    for _ in range(5):
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_tensors_come_back_from_the_device_as_they_went():
    transfers, sent = Transfers(DEVICE), [torch.randn(1 + 997 * number) for number in range(64)]
    moved = [transfers.to_device(tensor) for tensor in sent]
    doubled = [tensor * 2 for tensor in moved]
    del moved
    back = [transfers.to_wire(tensor, "float32") for tensor in doubled]
    del doubled
    transfers.mark()()
    for tensor, own in zip(sent, back, strict=True):
        assert own.is_pinned()
        assert torch.equal(own, tensor * 2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3"])
def test_a_server_on_two_devices_trains_and_generates_as_the_cpu(family, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint(family)
    swarm = start_swarm(checkpoint, [(0, 4)], devices=("cuda:0", "cuda:1"))
    classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
    remote, local = pair(*classes, checkpoint, swarm, "deep_ptune", num_labels=3)
    for model in (remote, local):
        model(**right_padded_batch()).loss.backward()
    assert_same_gradients(remote, local, 1e-4)
    models = pair(AutoDistributedModelForCausalLM, LocalModelForCausalLM, checkpoint, swarm, None)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = right_padded_batch()["input_ids"][:1]
    assert torch.equal(*(model.eval().generate(prompt, **options) for model in models))


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_quantised_blocks_train_as_on_the_cpu(quant_type, tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    grads = []
    for device in ("cpu", str(DEVICE)):
        swarm = start_swarm(checkpoint, [(0, 4)], device=device, quant_types=[quant_type])
        classes = AutoDistributedModelForSequenceClassification, LocalModelForSequenceClassification
        remote, _ = pair(*classes, checkpoint, swarm, "deep_ptune", num_labels=3)
        remote(**right_padded_batch()).loss.backward()
        grads.append(remote)
    assert_same_gradients(grads[1], grads[0], 1e-2)  # a weight between two codes may be rounded either way
