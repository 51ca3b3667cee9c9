"""`save_pretrained` of a distributed model writes what was trained, and `from_pretrained` of that gives it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.models import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
)
from tests.helpers.parity import right_padded_batch
from tests.helpers.samples import Samples

NAMES = {0: "bad", 1: "fair", 2: "good"}


@pytest.fixture
def swarm(tiny_checkpoint, start_swarm):
    return start_swarm(tiny_checkpoint("llama"), [(0, 4)])


def moved(model):
    """The model with trained weights that no start has."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_a_classifier_comes_back_with_its_head_and_classes(mode, swarm, tmp_path):
    options = {"tuning_mode": mode, "pre_seq_len": 3 if mode else None, "pad_token_id": 0}
    model = moved(
        swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, id2label=NAMES, **options)
    )
    model.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    again = AutoDistributedModelForSequenceClassification.from_pretrained(
        tmp_path, initial_peers=swarm.initial_peers, pad_token_id=0
    )
    with again:
        batch = right_padded_batch()
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert again.config.id2label == NAMES


@pytest.mark.slow
def test_a_language_model_comes_back_with_its_prompts(swarm, tmp_path):
    options = {"tuning_mode": "deep_ptune", "pre_seq_len": 3}
    model = moved(swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, **options))
    model.save_pretrained(tmp_path)
    ids = right_padded_batch()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    base = {"initial_peers": swarm.initial_peers, "dht_prefix": model.config.dht_prefix}
    for load in (
        lambda: AutoDistributedModelForCausalLM.from_pretrained(tmp_path, **base),
        lambda: AutoDistributedModelForCausalLM.from_pretrained(
            model.checkpoint.name_or_path, prompts=tmp_path, **base
        ),
    ):
        with load() as again:
            assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


@pytest.mark.slow
def test_trainers_checkpoints_are_small_and_resume(swarm, tmp_path):
    """Hugging Face's Trainer saves by `save_pretrained` and looks for `model.safetensors`."""
    options = {"num_labels": 3, "pad_token_id": 0, "tuning_mode": "deep_ptune", "pre_seq_len": 3}

    def train(epochs, resume):
        torch.manual_seed(1)
        model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, **options)
        settings = tf.TrainingArguments(
            str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            save_strategy="epoch", use_cpu=True, disable_tqdm=True, seed=3, lr_scheduler_type="constant",
        )  # fmt: skip
        tf.Trainer(model, settings, train_dataset=Samples(True)).train(resume_from_checkpoint=resume)
        return prompts_of(model).deep.detach().clone()

    whole = train(2, None)
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert (first / "model.safetensors").stat().st_size < 10_000
    assert torch.allclose(train(2, str(first)), whole, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("auto", "words"),
    [
        (AutoDistributedModelForCausalLM, "does not hold what this model trains: score.weight differ"),
        (AutoDistributedModel, "does not hold what this model trains"),
    ],
)
def test_another_class_is_refused(auto, words, swarm, tmp_path):
    options = {"num_labels": 3, "tuning_mode": "ptune", "pre_seq_len": 3}
    swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, **options).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        auto.from_pretrained(tmp_path, initial_peers=swarm.initial_peers)


@pytest.mark.slow
def test_what_cannot_be_saved_or_loaded_is_one_line(swarm, tmp_path):
    with pytest.raises(ConfigurationError, match="has nothing of its own to save"):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True).save_pretrained(tmp_path)
    model = swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, num_labels=2)
    with pytest.raises(ConfigurationError, match="call push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="a classification head and no prompts"):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, prompts=tmp_path)
    card = json.loads((tmp_path / "prompts.json").read_text()) | {"fingerprint": "another"}
    Path(tmp_path / "prompts.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="were trained for"):
        AutoDistributedModelForSequenceClassification.from_pretrained(tmp_path, initial_peers=swarm.initial_peers)
