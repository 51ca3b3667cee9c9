"""Tiny random models of every family that the project promises, and some more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedConfig

from petals_lightning.hf.loading import quiet_transformers

NUM_BLOCKS, HIDDEN, VOCAB = 4, 32, 96
HEAVIER_BLOCKS = 6
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": NUM_BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_FALCON = {k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "max_position_embeddings")}

TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_COMMON, num_key_value_heads=2),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=NUM_BLOCKS, n_head=4, pad_token_id=0),
    "falcon": lambda: tf.FalconConfig(**_FALCON),
    "falcon_new": lambda: tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: tf.FalconConfig(**_FALCON, alibi=True),
    "mixtral": lambda: tf.MixtralConfig(**_COMMON, **_GROUPED, num_local_experts=4),
    "mistral": lambda: tf.MistralConfig(**_COMMON, **_GROUPED, sliding_window=5),
    "qwen2": lambda: tf.Qwen2Config(**_COMMON, num_key_value_heads=2),
    "qwen3": lambda: tf.Qwen3Config(**_COMMON, **_GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**_COMMON, **_GROUPED, sliding_window=5),
    "gemma3": lambda: tf.Gemma3TextConfig(**_COMMON, **_GROUPED, sliding_window=5),
    "phi3": lambda: tf.Phi3Config(**_COMMON, num_key_value_heads=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_COMMON),
    "gpt2": lambda: tf.GPT2Config(**_GPT2),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=NUM_BLOCKS, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, pad_token_id=0,
    ),
    "gptj": lambda: tf.GPTJConfig(**_GPT2, rotary_dim=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_COMMON, **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "granite": lambda: tf.GraniteConfig(**_COMMON, num_key_value_heads=2, embedding_multiplier=3.0),
}  # fmt: skip

# These have no class for sequence classification in transformers.
CAUSAL_ONLY = {"granite"}


def longrope_config(switch: int) -> PreTrainedConfig:
    """Long and short factors, beyond and up to `switch` positions, that differ so much that every mistake shows."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
    return tf.Phi3Config(
        **_COMMON, num_key_value_heads=2, original_max_position_embeddings=switch, eos_token_id=1, bos_token_id=1,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10.0, "factor": 4.0, **factors},
    )  # fmt: skip


def save_tiny_checkpoint(config: PreTrainedConfig, folder: Path, *, seed: int = 0, **save_options: object) -> Path:
    """A random model in `folder`; initialised wider than usual, so that every block matters in the result."""
    torch.manual_seed(seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif "bias" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder, **save_options)
    return folder


def save_heavier_checkpoint(folder: Path) -> Path:
    """Heavy enough that what happens to a server shortly after a request lands while it is computed."""
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=HEAVIER_BLOCKS,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return save_tiny_checkpoint(config, folder)
