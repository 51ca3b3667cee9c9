"""Prompts and adapters to and from the hub: what is uploaded, what is loaded from its cache, and what failures say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    lora_of,
    prompts_of,
    push_adapter_to_hub,
    push_prompts_to_hub,
    save_adapter,
    save_prompts,
)
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.prompt_hub import stage, stage_adapter
from tests.helpers.families import VOCAB

REPO, COMMIT = "someone/tuned-prompts", "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, torch
from petals_lightning.models.local import LocalModelForCausalLM
model = LocalModelForCausalLM.from_pretrained(sys.argv[1], **{sys.argv[5]: sys.argv[2]})
torch.save(model(torch.load(sys.argv[3])).logits.detach(), sys.argv[4])
"""
PUSH = """
import sys
from petals_lightning.errors import PetalsLightningError
from petals_lightning import models
try:
    getattr(models, sys.argv[3])(sys.argv[1], sys.argv[2])
except PetalsLightningError as e:
    print(type(e).__name__, e)
"""


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """A folder of prompts beside which other files lie, and the model that has them."""
    model = LocalModelForCausalLM.from_pretrained(
        str(tiny_checkpoint("llama")), tuning_mode="deep_ptune", pre_seq_len=3
    )
    folder = tmp_path / "prompts"
    save_prompts(moved(model, prompts_of(model)), folder, command="python train.py recipe=x")
    (folder / "secret.txt").write_text("not for the hub")
    return model, folder


@pytest.fixture
def saved_adapter(tiny_checkpoint, tmp_path):
    """A folder of LoRA, and the model that has it."""
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    model = LocalModelForCausalLM.from_pretrained(str(tiny_checkpoint("llama")), tuning_mode="lora", lora=lora)
    folder = tmp_path / "adapter"
    save_adapter(moved(model, lora_of(model)), folder, metrics={"val/perplexity": 2.5}, command="python train.py x")
    (folder / "secret.txt").write_text("not for the hub")
    return model, folder


def moved(model, tuning):
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(0, 0.3)
    return model


def cache(home: Path) -> Path:
    """The folder of `REPO` in a hub cache below `home`, laid out as the hub's library does it."""
    cached = home / "hub" / f"models--{REPO.replace('/', '--')}"
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    return cached / "snapshots" / COMMIT


def python(script: str, *arguments: object, home: Path, **environment: str) -> str:
    """The output of a process that has no token and its hub cache below `home`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=known | {"HF_HOME": str(home), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_three_files_are_uploaded_and_the_card_names_the_repository(saved, tmp_path):
    _, folder = saved
    staged = tmp_path / "staged"
    staged.mkdir()
    stage(folder, REPO, staged)
    assert {path.name for path in staged.iterdir()} == {"README.md", "prompts.json", "prompts.safetensors"}
    for name in ("prompts.json", "prompts.safetensors"):
        assert (staged / name).read_bytes() == (folder / name).read_bytes()
    readme = (staged / "README.md").read_text()
    assert f"--prompts {REPO} --initial-peers" in readme
    assert "base_model:" not in readme, "a folder of this machine is no repository"


@pytest.mark.slow
def test_prompts_are_loaded_by_hub_id(saved, tiny_checkpoint, tmp_path):
    """From the hub's cache, without a network."""
    model, folder = saved
    stage(folder, REPO, cache(tmp_path / "home"))
    ids, logits = torch.randint(1, VOCAB, (2, 7)), tmp_path / "logits.pt"
    torch.save(ids, tmp_path / "ids.pt")
    checkpoint = tiny_checkpoint("llama")
    given = [checkpoint, REPO, tmp_path / "ids.pt", logits]
    python(LOAD, *given, "prompts", home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert torch.equal(torch.load(logits), model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["adapter", "active_adapter"])
def test_an_adapter_is_loaded_by_hub_id(argument, saved_adapter, tiny_checkpoint, tmp_path):
    model, folder = saved_adapter
    staged = cache(tmp_path / "home")
    stage_adapter(folder, REPO, staged)
    assert {path.name for path in staged.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    readme = (staged / "README.md").read_text()
    assert f"--adapter {REPO} --initial-peers" in readme
    assert "| val/perplexity | 2.5 |" in readme
    ids, logits = torch.randint(1, VOCAB, (2, 7)), tmp_path / "logits.pt"
    torch.save(ids, tmp_path / "ids.pt")
    given = [tiny_checkpoint("llama"), REPO, tmp_path / "ids.pt", logits]
    python(LOAD, *given, argument, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert torch.equal(torch.load(logits), model(ids).logits)


def test_what_is_not_on_the_hub_says_so(tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"no prompts at 'someone/nothing': neither a folder .* nor"):
        AutoDistributedModelForCausalLM.from_pretrained(
            str(tiny_checkpoint("llama")), prompts="someone/nothing", dht_prefix="x", initial_peers=["x"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("push", [push_prompts_to_hub, push_adapter_to_hub])
def test_pushing_fails_in_one_clear_line(push, saved, saved_adapter, tmp_path):
    folder = (saved if push is push_prompts_to_hub else saved_adapter)[1]
    for environment, words in (
        ({}, "ConfigurationError there is no token for the hub"),
        ({"HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.1:9"}, f"HubError {folder} was not pushed to '{REPO}': "),
    ):
        said = python(PUSH, folder, REPO, push.__name__, home=tmp_path / "empty", **environment)
        assert said.startswith(words)
        assert said.count("\n") == 1
    with pytest.raises(ConfigurationError, match=r"repo_id='a/b/c': it must be ORG/NAME"):
        push(folder, "a/b/c", token="hf_x")
    with pytest.raises(CheckpointError, match=r"has no (prompts|adapter_config)\.json"):
        push(tmp_path, REPO, token="hf_x")
