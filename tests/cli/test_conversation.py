"""What a model sees in a chat over a swarm is `apply_chat_template` of the whole conversation, token for token."""

from __future__ import annotations

from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from petals_lightning.cli.conversation import Conversation
from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.errors import DataError
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import AutoDistributedModelForCausalLM
from tests.helpers.chat_templates import GEMMA, QWEN3, TEMPLATES, make_tokenizer
from tests.helpers.families import save_tiny_checkpoint
from tools.testing.swarms import InProcessSwarm

VOCAB, NEW_TOKENS = 520, 6
QUESTIONS = ("What is it?", "  Hello there\n", "So?")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model through two servers, and the same one here."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    folder = save_tiny_checkpoint(config, tmp_path_factory.mktemp("model"))
    with quiet_transformers():
        local = AutoModelForCausalLM.from_pretrained(folder)
    with InProcessSwarm(folder, [(0, 2), (2, 4)]) as swarm:
        yield SimpleNamespace(remote=swarm.load(AutoDistributedModelForCausalLM), local=local)


def said_locally(model, prompt: list[int], ends: list[int], **options) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), eos_token_id=ends, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tokenizer_kind", ["byte_level_with_prefix_space", "llama2"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_model_sees_the_whole_template_and_answers_as_it_does_locally(models, monkeypatch, kind, tokenizer_kind):
    tokenizer = make_tokenizer(tokenizer_kind, *TEMPLATES[kind])
    assert len(tokenizer) <= VOCAB
    generate, sent = models.remote.generate, []
    monkeypatch.setattr(
        models.remote, "generate", lambda new, **options: sent.append(new.shape[1]) or generate(new, **options)
    )
    # Every answer begins with a thought, which Qwen3's and DeepSeek's templates drop later.
    thought = tokenizer("<think>\nhm\n</think>\n\n", add_special_tokens=False)["input_ids"]
    prompt: Any = []

    def allowed(_: int, tokens: torch.Tensor) -> list[int]:
        at = len(tokens) - len(prompt)
        return [thought[at]] if at < len(thought) else list(range(24, len(tokenizer)))

    options: dict[str, Any] = {"max_new_tokens": len(thought) + NEW_TOKENS, "prefix_allowed_tokens_fn": allowed}
    with models.remote.inference_session(max_length=512) as session:
        conversation = Conversation(
            models.remote, DialogueFormat(tokenizer), session, system=None, do_sample=False, pad_token_id=0, **options
        )
        dialogue: list[Any] = []
        known: list[int] = []
        for question in QUESTIONS:
            dialogue.append(Message(role="user", content=question))
            prompt = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
            answer, count = conversation.reply(question)
            seen = session.tokens[0].tolist()
            assert seen[: len(prompt)] == prompt
            assert seen[len(prompt) :] == said_locally(models.local, prompt, conversation.end_ids, **options)
            assert count == len(seen) - len(prompt)
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(known, prompt, strict=False))))
            assert sent[-1] == len(prompt) - shared, "only what is new is sent"
            assert "hm" in answer
            dialogue.append(Message(role="assistant", content=answer))
            known = seen
    assert conversation.messages == dialogue
    assert ("hm" in tokenizer.decode(prompt)) == (kind not in ("qwen3", "deepseek_v3", "deepseek_r1"))


def test_every_end_of_the_generation_config_ends_an_answer(models, monkeypatch):
    """As Gemma's, whose turns end with another token than the tokenizer's eos; the end is no part of the answer."""
    tokenizer = make_tokenizer("byte_level", QWEN3, "<|im_end|>")
    form, question = DialogueFormat(tokenizer), "What is it?"
    prompt = form.prompt([Message(role="user", content=question)])
    free = said_locally(models.local, prompt, [3], max_new_tokens=9)
    end = next(at for at in range(2, 9) if free[at] not in free[:at])
    for named, expected in (([3, free[end]], [3, free[end]]), (free[end], [free[end]]), (None, [])):
        monkeypatch.setattr(models.remote, "generation_config", GenerationConfig(eos_token_id=named, pad_token_id=0))
        with models.remote.inference_session(max_length=128) as session:
            conversation = Conversation(models.remote, form, session, system=None, max_new_tokens=9, do_sample=False)
            assert conversation.end_ids == [*expected, tokenizer.eos_token_id]
            answer, count = conversation.reply(question)
            assert count == (end + 1 if expected else 9)
            assert answer == form.decode(free[:end] if expected else free)


def test_a_template_without_a_system_turn_is_told_of_at_once(models):
    tokenizer = make_tokenizer("byte_level", GEMMA)
    with models.remote.inference_session(max_length=128) as session:
        options: dict[str, Any] = {"system": "Be kind.", "max_new_tokens": 3, "do_sample": False}
        with pytest.raises(DataError, match=r"System role not supported\); .*--merge-system"):
            Conversation(models.remote, DialogueFormat(tokenizer), session, **options)
        merging = DialogueFormat(tokenizer, merge_system=True)
        conversation = Conversation(models.remote, merging, session, **options)
        conversation.reply("So?")
        merged: list[Any] = [Message(role="user", content="Be kind.\n\nSo?")]
        prompt = tokenizer.apply_chat_template(merged, add_generation_prompt=True, return_dict=False)
        assert session.tokens[0, : len(prompt)].tolist() == prompt
