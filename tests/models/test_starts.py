"""Prompts that start as a text are that text: outputs are plain Hugging Face's with its tokens in front."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_lightning.errors import ConfigurationError
from petals_lightning.models import AutoDistributedModelForCausalLM, prompts_of, save_prompts
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.models.prompts import TuningMode
from petals_lightning.models.starts import PromptStart
from petals_lightning.modules import SequenceClassificationModule
from tests.helpers.families import RECURRENT_CONFIGS, TINY_CONFIGS, VOCAB
from tests.helpers.parity import UNEVEN
from tools.testing.tensors import relative_error

P = 5
TEXT = "w1 w7 w40"
TOKENS = [4, 10, 43, 4, 10]  # repeated to P
IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def with_tokenizer(tiny_checkpoint, text_model, tmp_path) -> Callable[[str], Path]:
    """The folder of a family's tiny model with the text model's tokenizer."""

    def make(family: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(tiny_checkpoint(family), folder)
        for file in text_model.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return make


def load(checkpoint: Path, mode: TuningMode = "ptune", seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    return LocalModelForCausalLM.from_pretrained(checkpoint, tuning_mode=mode, pre_seq_len=P, **options)


def logits_after_the_text(checkpoint: Path) -> torch.Tensor:
    """Plain Hugging Face's logits [2, 6, V] at the samples' own tokens."""
    tokens = torch.tensor(TOKENS).expand(2, -1)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(checkpoint)(torch.cat([tokens, IDS], dim=1)).logits[:, P:]


@pytest.mark.parametrize("family", [*TINY_CONFIGS, *RECURRENT_CONFIGS])
def test_a_text_start_is_the_text_in_front(family, tiny_checkpoint):
    checkpoint = tiny_checkpoint(family)
    expected = logits_after_the_text(checkpoint)
    for mode in ("ptune", "deep_ptune"):
        model = load(checkpoint, mode)
        start = PromptStart("text", tuple(TOKENS))  # not from a tokenizer, as families insist on classes of their own
        prompts_of(model).reset_parameters(start.values(model.get_input_embeddings(), P))
        with torch.no_grad():
            assert relative_error(model(IDS).logits[:, -IDS.shape[1] :], expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["deep_ptune", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt", "bloom", "falcon_new", "mistral"])
def test_a_start_is_the_same_in_a_swarm(family, mode, with_tokenizer, start_swarm):
    checkpoint = with_tokenizer(family)
    swarm = start_swarm(checkpoint, UNEVEN)
    text: dict[str, Any] = {"prompt_init": "text", "prompt_init_text": TEXT}
    for start in ({}, {"prompt_init": "vocabulary"}, text):
        torch.manual_seed(1)
        model = swarm.load(AutoDistributedModelForCausalLM, shared_peer=True, tuning_mode=mode, pre_seq_len=P, **start)
        local = load(checkpoint, mode, **start)
        for own, expected in zip(prompts_of(model).parameters(), prompts_of(local).parameters(), strict=True):
            if mode == "prefix" and start:  # made by the blocks, with their rounding
                assert relative_error(own, expected) < 1e-5
            else:
                assert torch.equal(own, expected)
    with torch.no_grad():
        for each in (model, local):
            assert relative_error(each(IDS).logits[:, -IDS.shape[1] :], logits_after_the_text(checkpoint)) < 1e-5


def test_a_text_start_is_that_of_peft(with_tokenizer):
    checkpoint = with_tokenizer("llama")
    embeddings: Any = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings()
    for text in (TEXT, "w1 w2 w3 w4 w5 w6 w7"):
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=embeddings.weight.shape[1],
            num_transformer_submodules=1, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(checkpoint),
        )  # fmt: skip
        theirs = peft.tuners.prompt_tuning.PromptEmbedding(config, embeddings)
        ours = prompts_of(load(checkpoint, prompt_init="text", prompt_init_text=text))
        assert torch.equal(ours.input, theirs.embedding.weight)


def test_a_vocabulary_start_is_rows_that_the_seed_draws(with_tokenizer):
    checkpoint = with_tokenizer("llama")
    rows = AutoModelForCausalLM.from_pretrained(checkpoint).get_input_embeddings().weight
    starts = [prompts_of(load(checkpoint, seed=seed, prompt_init="vocabulary")).input for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert all((rows == prompt).all(dim=1).any() for prompt in starts[0])


def test_a_random_start_is_as_long_as_what_the_embeddings_return(with_tokenizer):
    checkpoint = with_tokenizer("gemma3")  # whose embeddings scale their weights
    model = load(checkpoint)
    lengths = model.get_input_embeddings()(torch.arange(VOCAB)).norm(dim=1)
    assert prompts_of(model).input.norm(dim=1).mean().item() == pytest.approx(lengths.mean().item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_init": "words"}, "prompt_init=words: must be one of random, vocabulary, text"),
        ({"prompt_init": "text"}, "prompt_init=text needs a text: set prompt_init_text"),
        ({"prompt_init_text": "w1"}, "prompt_init_text='w1' is not used with prompt_init=random: set prompt_init=text"),
        ({"prompt_init": "text", "prompt_init_text": "  "}, "prompt_init_text='  ': it has no tokens"),
        ({"prompt_init": "text", "prompt_init_text": "new"}, "has the token 96, the model has embeddings for 0…95"),
    ],
)
def test_a_start_that_cannot_be_is_refused(options, message, with_tokenizer):
    checkpoint = with_tokenizer("llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ConfigurationError, match=message):
        load(checkpoint, **options)
    if "  " not in message and "96" not in message:
        with pytest.raises(ConfigurationError, match=message):
            SequenceClassificationModule(str(checkpoint), **options)


def test_saved_prompts_have_no_start(with_tokenizer, tmp_path):
    checkpoint = with_tokenizer("llama")
    save_prompts(load(checkpoint), tmp_path / "saved")
    with pytest.raises(ConfigurationError, match="prompt_init=vocabulary: saved prompts are loaded"):
        LocalModelForCausalLM.from_pretrained(checkpoint, prompts=tmp_path / "saved", prompt_init="vocabulary")
