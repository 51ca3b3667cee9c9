"""Tokenizer, samples and model are checked against each other before the first step, local and in a swarm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.strategies import Strategy
from transformers import AutoTokenizer

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import ConfigurationError
from petals_lightning.modules import SequenceClassificationModule
from petals_lightning.strategies import LocalSwarm, RemoteBlockStrategy
from tests.helpers.families import TINY_CONFIGS, VOCAB, save_tiny_checkpoint


@pytest.fixture
def gpt2(text_model: Path, tmp_path: Path) -> Path:
    """A tiny GPT-2, which has 64 positions, with a tokenizer."""
    folder = save_tiny_checkpoint(TINY_CONFIGS["gpt2"](), tmp_path / "gpt2")
    for file in text_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def fit(model: Path, texts: Path, strategy: str | Strategy, folder: Path, **options: object) -> None:
    data = TextClassificationDataModule(str(model), str(texts), batch_size=4, max_length=100)
    module = SequenceClassificationModule(str(model), tuning_mode="ptune", **options)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        strategy=strategy, max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "swarm"])
def test_samples_that_are_longer_than_the_model_are_refused_at_the_start(place, gpt2, tmp_path):
    texts = tmp_path / "texts.jsonl"
    rows = [{"sentence": "w1 " * length, "label": length % 2} for length in (3, 5, 4, 61, 2, 6)]
    texts.write_text("\n".join(json.dumps(row) for row in rows))
    strategy = RemoteBlockStrategy(LocalSwarm(num_servers=1)) if place == "swarm" else "auto"
    with pytest.raises(
        ConfigurationError, match=r"^pre_seq_len=4 .* 61 tokens: .* has 64 positions; set max_length=60 or less"
    ):
        fit(gpt2, texts, strategy, tmp_path, pre_seq_len=4)
    if place == "local":
        fit(gpt2, texts, strategy, tmp_path, pre_seq_len=3)


def test_an_added_token_is_refused_at_the_start(gpt2, texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(gpt2)
    rows = [{"sentence": f"w{number} brandnew", "label": number % 2} for number in range(1, 6)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ConfigurationError, match=f"gives the token {VOCAB}, .* has embeddings for 0…{VOCAB - 1}"):
        fit(gpt2, tmp_path / "texts.jsonl", "auto", tmp_path, pre_seq_len=2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "swarm"])
def test_a_pad_token_without_an_embedding_is_refused(place, gpt2, texts, tmp_path):
    settings = json.loads((gpt2 / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<padding>"
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(settings))
    strategy = RemoteBlockStrategy(LocalSwarm(num_servers=1)) if place == "swarm" else "auto"
    with pytest.raises(ConfigurationError, match=f"pad_token_id is {VOCAB}, the model has embeddings for"):
        fit(gpt2, texts, strategy, tmp_path)
