"""Families that cannot be served exactly are refused in one line, when a server loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModel, PreTrainedConfig

from petals_lightning.errors import RemoteRequestError, UnsupportedModelError
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.hf.decoder import model_class
from petals_lightning.models import AutoDistributedModel, AutoDistributedModelForCausalLM, remote_blocks
from petals_lightning.server.blocks.block_runner import BlockRunner
from petals_lightning.server.blocks.self_checks import check_family, telling_blocks, verify_sessions
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.loading import load_span
from tests.helpers.families import (
    COMMON,
    GROUPED,
    HIDDEN,
    NUM_BLOCKS,
    RECURRENT_CONFIGS,
    TINY_CONFIGS,
    VOCAB,
    save_tiny_checkpoint,
)

REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "rwkv": (
        lambda: tf.RwkvConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=NUM_BLOCKS, attention_hidden_size=HIDDEN
        ),
        "keeps another kind of state",
    ),
    "gemma4": (
        lambda: tf.Gemma4TextConfig(
            **COMMON, **GROUPED, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0
        ),
        "per-layer inputs",
    ),
    "gemma4_shared": (
        lambda: tf.Gemma4TextConfig(
            **COMMON, **GROUPED, hidden_size_per_layer_input=0, num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        "read the keys and values of blocks before them",
    ),
    "zamba2": (
        lambda: tf.Zamba2Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=NUM_BLOCKS, num_attention_heads=4, mamba_d_state=8,
            intermediate_size=48, n_mamba_heads=8, mamba_ngroups=1, chunk_size=4,
            layers_block_type=["linear_attention", "hybrid"] * 2,
        ),
        "cannot be split",
    ),
    "gemma3_bidirectional": (
        lambda: tf.Gemma3TextConfig(**COMMON, **GROUPED, sliding_window=5, use_bidirectional_attention=True),
        "attention is bidirectional",
    ),
    "bert": (
        lambda: tf.BertConfig(**COMMON),
        "embeds no tokens, as in encoders like BERT",
    ),
    "t5": (
        lambda: tf.T5Config(vocab_size=VOCAB, d_model=HIDDEN, num_layers=NUM_BLOCKS, num_heads=4, d_ff=48, d_kv=8),
        "is an encoder-decoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(family, tmp_path, start_swarm):
    make, reason = REFUSED[family]
    with quiet_transformers():
        AutoModel.from_config(make()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        start_swarm(tmp_path, [(0, NUM_BLOCKS)])
    assert "\n" not in str(refusal.value)


def span_of(config: PreTrainedConfig, folder, start: int = 0, end: int = NUM_BLOCKS) -> BlockSpan:
    checkpoint = Checkpoint(str(save_tiny_checkpoint(config, folder)))
    part = load_pruned(
        model_class(AutoModel, checkpoint),
        checkpoint,
        ModelSlice(start, end, with_embeddings_and_head=False),
        dtype="float32",
    )
    return BlockSpan(part.model, part.layout, start)


def test_blocks_that_hand_each_other_more_than_hidden_states_are_refused(tmp_path, monkeypatch):
    span = span_of(TINY_CONFIGS["llama"](), tmp_path)
    held: dict[str, Any] = {}
    check_family(span)
    run, first, last = BlockRunner.run, span.blocks[2].input_layernorm.forward, span.blocks[3].input_layernorm.forward

    def one_pass(self, *args, **padding):
        held.clear()
        return run(self, *args, **padding)

    def gives(hidden):
        held["other"] = hidden
        return first(hidden)

    monkeypatch.setattr(BlockRunner, "run", one_pass)
    monkeypatch.setattr(span.blocks[2].input_layernorm, "forward", gives)
    monkeypatch.setattr(span.blocks[3].input_layernorm, "forward", lambda hidden: last(hidden) + held.get("other", 0))
    with pytest.raises(UnsupportedModelError, match="read more than the hidden states of the block before"):
        check_family(span)


def test_attention_that_looks_ahead_in_short_samples_only_is_refused(tmp_path, monkeypatch):
    span = span_of(TINY_CONFIGS["llama"](), tmp_path)
    honest = span.blocks[1].mlp.forward

    def looks_ahead(hidden):
        return honest(hidden if hidden.shape[1] > 4 else hidden.mean(1, keepdim=True).expand_as(hidden))

    monkeypatch.setattr(span.blocks[1].mlp, "forward", looks_ahead)
    with pytest.raises(UnsupportedModelError, match="its attention is bidirectional"):
        check_family(span)


def test_what_a_familys_own_code_raises_is_told_in_one_line(tmp_path, monkeypatch):
    span = span_of(TINY_CONFIGS["llama"](), tmp_path)

    def broken(*args, **kwargs):
        raise KeyError("attn_kind\nand more")

    monkeypatch.setattr(span.blocks[1].mlp, "forward", broken)
    with pytest.raises(UnsupportedModelError, match=r"do not run by themselves \(KeyError: .*attn_kind") as refusal:
        check_family(span)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", sorted(RECURRENT_CONFIGS))
@pytest.mark.parametrize("part", [(0, 4), (1, 4), (2, 3)], ids=str)
def test_families_with_a_recurrent_state_are_served_without_sessions(family, part, tmp_path):
    span = span_of(RECURRENT_CONFIGS[family](), tmp_path, *part)
    check_family(span)
    assert not verify_sessions(span)


@pytest.mark.slow
def test_a_session_of_such_a_family_is_refused_in_one_line(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("qwen3_next"), [(0, 1), (1, 4)])
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    with layers.inference_session(max_length=4) as session, pytest.raises(RemoteRequestError) as refusal:
        session.step(torch.randn(1, 2, HIDDEN))
    assert "keeps more than keys and values" in str(refusal.value)
    model = swarm.load(AutoDistributedModelForCausalLM)
    with pytest.raises(RemoteRequestError, match="train"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


KINDS: dict[str, tuple[Callable[[], PreTrainedConfig], tuple[int, int]]] = {
    "all alike": (TINY_CONFIGS["llama"], (0, 1)),
    "by turns": (TINY_CONFIGS["gemma2"], (0, 2)),
    "full attention in the third": (
        lambda: tf.Gemma3TextConfig(
            **COMMON, **GROUPED, sliding_window=5,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        (1, 3),
    ),
    "experts in all but the first": (
        lambda: tf.Qwen3MoeConfig(
            **COMMON, **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            mlp_only_layers=[0],
        ),
        (0, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_among_those_that_tell_for_all(kind, tmp_path):
    make, expected = KINDS[kind]
    checkpoint = Checkpoint(str(save_tiny_checkpoint(make(), tmp_path)))
    span = load_span(checkpoint, 0, NUM_BLOCKS, devices=[torch.device("cpu")] * NUM_BLOCKS, dtype="auto")
    assert telling_blocks(span) == expected
    later = load_span(checkpoint, 1, NUM_BLOCKS, devices=[torch.device("cpu")] * (NUM_BLOCKS - 1), dtype="auto")
    start, end = telling_blocks(later)
    assert 1 <= start < end <= NUM_BLOCKS
