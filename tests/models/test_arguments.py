"""`from_pretrained` takes what Hugging Face's takes or says why not; a misspelt argument never has another meaning."""

from __future__ import annotations

import shutil

import pytest
import torch

from petals_lightning.errors import ConfigurationError
from petals_lightning.models import (
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from petals_lightning.models import auto as auto_module
from petals_lightning.models.local import LocalModelForSequenceClassification
from tests.helpers.families import VOCAB
from tools.testing.swarms import PREFIX

IDS = torch.randint(1, VOCAB, (2, 6))


@pytest.fixture
def swarm(tiny_checkpoint, start_swarm):
    return start_swarm(tiny_checkpoint("llama"), [(0, 4)])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"inital_peers": ["/ip4/1.2.3.4"]}, "no argument 'inital_peers', .* did you mean initial_peers?"),
        ({"tuning_mod": "ptune"}, "no argument 'tuning_mod', .* did you mean tuning_mode?"),
        ({"num_label": 3}, "no argument 'num_label', .* did you mean num_labels?"),
        ({"low_cpu_mem_usage": True}, "no argument 'low_cpu_mem_usage', and LlamaConfig has no such value"),
        ({"to_dict": 1}, "no argument 'to_dict'"),
        ({"trust_remote_code": True}, "code that comes with a checkpoint is never run"),
        ({"device_map": "auto"}, r"the local part of the model is loaded on the CPU; move it by model.to\(device\)"),
        ({"attn_implementation": "eager"}, "attention runs on the servers"),
        ({"quantization_config": {"load_in_4bit": True}}, "blocks are on the servers"),
        ({"config": object()}, "change single values by their names"),
    ],
)
def test_unknown_arguments_are_refused_before_anything_is_joined(argument, words, tiny_checkpoint, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a swarm was joined")

    monkeypatch.setattr(auto_module, "SwarmNode", no_network)
    for auto in (AutoDistributedModel, AutoDistributedModelForCausalLM, LocalModelForSequenceClassification):
        if "peers" in str(argument) and auto is LocalModelForSequenceClassification:
            continue  # which has no such argument to suggest
        with pytest.raises(ConfigurationError, match=words):
            auto.from_pretrained(str(tiny_checkpoint("llama")), **argument)


def test_hugging_faces_arguments_work(swarm, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "inner")
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        pretrained_model_name_or_path=tmp_path,
        subfolder="inner",
        local_files_only=True,
        cache_dir=str(tmp_path / "cache"),
        trust_remote_code=False,
        device_map=None,
        torch_dtype="float32",
        num_labels=4,
        id2label=dict(enumerate("abcd")),
        problem_type="single_label_classification",
        initial_peers=swarm.initial_peers,
        dht_prefix=PREFIX,
    )
    with model:
        assert model(input_ids=IDS, labels=torch.tensor([0, 3])).logits.shape == (2, 4)
        assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


@pytest.mark.parametrize("form", ["{0}", " {0}\n", ["{0}"], [" {0} "], "{0} {0}", "{0},{0}"])
def test_peers_may_be_written_in_any_way(form, swarm, tiny_checkpoint):
    peer = swarm.initial_peers[0]
    peers = form.format(peer) if isinstance(form, str) else [each.format(peer) for each in form]
    with AutoDistributedModel.from_pretrained(
        str(tiny_checkpoint("llama")), initial_peers=peers, dht_prefix=PREFIX
    ) as model:
        assert model(input_ids=IDS).last_hidden_state.isfinite().all()


def test_positions_that_count_from_the_start_may_be_given(swarm):
    model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True)
    expected = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS, position_ids=torch.arange(6)[None]).logits, expected)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    padded = torch.arange(6).expand(2, -1).masked_fill(mask == 0, 1)
    found = model(input_ids=IDS, attention_mask=mask, position_ids=padded).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-6)
    with pytest.raises(ValueError, match="position_ids: servers number positions from the start"):
        model(input_ids=IDS, position_ids=torch.arange(1, 7)[None])
