"""A classification head that a checkpoint holds is trained on, where it is for the same classes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as tf

from petals_lightning.errors import CheckpointError
from petals_lightning.models import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_lightning.models.local import LocalModelForCausalLM, LocalModelForSequenceClassification
from tests.helpers.families import TINY_CONFIGS
from tests.helpers.parity import right_padded_batch
from tools.testing.tensors import relative_error

pytestmark = pytest.mark.slow

NAMES = {0: "bad", 1: "fair", 2: "good"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a head for three classes."""
    torch.manual_seed(0)
    config = TINY_CONFIGS[request.param]()
    config.id2label, config.label2id = NAMES, {name: number for number, name in NAMES.items()}
    config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("classifier")
    tf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def load(folder, start_swarm, **options):
    """The distributed and the local model."""
    swarm = start_swarm(folder, [(0, 2), (2, 4)])
    models = []
    for make in (
        lambda: swarm.load(AutoDistributedModelForSequenceClassification, shared_peer=True, **options),
        lambda: LocalModelForSequenceClassification.from_pretrained(str(folder), **options),
    ):
        torch.manual_seed(7)
        models.append(make())
    return models


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}, {"id2label": NAMES}])
def test_a_head_for_the_same_classes_is_kept(options, classifier, start_swarm):
    plain = tf.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    batch = right_padded_batch()
    for model in load(classifier, start_swarm, **options):
        assert torch.equal(model.score.weight, plain.score.weight)
        assert model.score.weight.requires_grad
        assert relative_error(model(**batch).logits, plain(**batch).logits) < 1e-5


@pytest.mark.parametrize(
    "options", [{"num_labels": 4}, {"num_labels": 2}, {"id2label": {0: "good", 1: "fair", 2: "bad"}}]
)
def test_a_head_for_other_classes_is_drawn_and_said_so(options, classifier, start_swarm, caplog):
    with caplog.at_level(logging.WARNING, "petals_lightning"):
        remote, local = load(classifier, start_swarm, **options)
    words = "is for the classes bad, fair, good, this one for"
    assert sum(words in record.getMessage() for record in caplog.records) == 2
    saved = tf.AutoModelForSequenceClassification.from_pretrained(classifier).score.weight
    assert torch.equal(remote.score.weight, local.score.weight)
    assert remote.score.weight.shape != saved.shape or not torch.equal(remote.score.weight, saved)
    assert remote.score.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_a_language_model_is_not_given_a_random_head(tmp_path, start_swarm):
    """What transformers does with a checkpoint that has none, with a warning."""
    folder = tmp_path / "headless"
    config = TINY_CONFIGS["llama"]()
    config.tie_word_embeddings = False
    tf.AutoModel.from_config(config).save_pretrained(folder)
    swarm = start_swarm(folder, [(0, 4)])
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        LocalModelForCausalLM.from_pretrained(str(folder))
