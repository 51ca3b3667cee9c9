"""Prompts saved and loaded: the same logits elsewhere, in PEFT too, and no other model takes them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    PromptCard,
    export_peft,
    load_prompts,
    prompts_of,
    save_prompts,
)
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.prompts import PROMPT_MODES, TuningMode
from tests.helpers.families import VOCAB

IDS = torch.randint(1, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
P = 5


def tuned(checkpoint, mode: TuningMode):
    model = LocalModelForCausalLM.from_pretrained(str(checkpoint), tuning_mode=mode, pre_seq_len=P)
    with torch.no_grad():
        for parameter in prompts_of(model).parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", PROMPT_MODES)
def test_saved_prompts_give_the_same_logits_elsewhere(mode, tiny_checkpoint, start_swarm, tmp_path):
    checkpoint = tiny_checkpoint("llama")
    local = tuned(checkpoint, mode)
    saved = save_prompts(local, tmp_path, metrics={"val/perplexity": 21.25}, command="python train.py recipe=x")
    card = PromptCard.read(tmp_path)
    assert card == saved
    assert (card.tuning_mode, card.pre_seq_len, card.metrics) == (mode, P, {"val/perplexity": 21.25})
    readme = (tmp_path / "README.md").read_text()
    for words in ("python train.py recipe=x", "| val/perplexity | 21.25 |", "petals-lightning chat", str(checkpoint)):
        assert words in readme
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "prompts.json", "prompts.safetensors"}
    remote = start_swarm(checkpoint, [(0, 4)]).load(AutoDistributedModelForCausalLM, prompts=tmp_path)
    assert torch.allclose(remote(IDS).logits, local(IDS).logits, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
def test_ptune_prompts_give_the_same_logits_in_peft(tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = tiny_checkpoint("llama")
    local = tuned(checkpoint, "ptune")
    export_peft(local, tmp_path)
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.allclose(theirs[:, P:], local(IDS).logits, atol=1e-5)
    with pytest.raises(ConfigurationError, match="ptune and prefix prompts only"):
        export_peft(tuned(checkpoint, "deep_ptune"), tmp_path)


def test_another_model_refuses_them(tiny_checkpoint, tmp_path):
    save_prompts(tuned(tiny_checkpoint("llama"), "ptune"), tmp_path)
    with pytest.raises(CheckpointError, match=r"trained for '.*llama.*', not for '.*mistral"):
        LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("mistral")), prompts=tmp_path)
    with pytest.raises(CheckpointError, match="trained for"):  # before any server is asked
        AutoDistributedModelForCausalLM.from_pretrained(
            str(tiny_checkpoint("mistral")), prompts=tmp_path, dht_prefix="x", initial_peers=["x"]
        )


def test_what_does_not_fit_is_said(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("llama")
    model, folder = tuned(checkpoint, "ptune"), tmp_path / "prompts"
    save_prompts(model, folder)
    with pytest.raises(ConfigurationError, match="pre_seq_len=5, but tuning_mode=deep_ptune"):
        LocalModelForCausalLM.from_pretrained(str(checkpoint), prompts=folder, tuning_mode="deep_ptune")
    with pytest.raises(ConfigurationError, match="load the model with prompts="):
        load_prompts(tuned(checkpoint, "deep_ptune"), folder)
    plain = LocalModelForCausalLM.from_pretrained(str(checkpoint))
    with pytest.raises(ConfigurationError, match="has no prompts"):
        save_prompts(plain, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no prompts\.json"):
        load_prompts(model, tmp_path)
    (folder / "prompts.json").write_text(json.dumps({"tuning_mode": "ptune"}))
    with pytest.raises(CheckpointError, match="is not a card of prompts"):
        load_prompts(model, folder)
