"""Tiny random models of every family that the project promises, and some more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from petals_lightning.hf.compat import quiet_transformers

NUM_BLOCKS, HIDDEN, VOCAB = 4, 32, 96
ALL = (0, NUM_BLOCKS)
"""The span of a server that holds all blocks."""
HEAVIER_BLOCKS, HEAVIER_HIDDEN = 6, 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": NUM_BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_FALCON: dict[str, Any] = {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "max_position_embeddings")}

TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON, num_key_value_heads=2),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=NUM_BLOCKS, n_head=4, pad_token_id=0),
    "falcon": lambda: tf.FalconConfig(**_FALCON),
    "falcon_new": lambda: tf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: tf.FalconConfig(**_FALCON, alibi=True),
    "mixtral": lambda: tf.MixtralConfig(**COMMON, **GROUPED, num_local_experts=4),
    "mistral": lambda: tf.MistralConfig(**COMMON, **GROUPED, sliding_window=5),
    "qwen2": lambda: tf.Qwen2Config(**COMMON, num_key_value_heads=2),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, **GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, **GROUPED, sliding_window=5),
    "gemma3": lambda: tf.Gemma3TextConfig(**COMMON, **GROUPED, sliding_window=5),
    "phi3": lambda: tf.Phi3Config(**COMMON, num_key_value_heads=2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: tf.GPT2Config(**_GPT2),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=NUM_BLOCKS, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, pad_token_id=0,
    ),
    "gptj": lambda: tf.GPTJConfig(**_GPT2, rotary_dim=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **COMMON, **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt_neo": lambda: tf.GPTNeoConfig(  # numbers its blocks as `layer_id`
        vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=NUM_BLOCKS, num_heads=4, max_position_embeddings=64,
        intermediate_size=48, attention_types=[[["global", "local"], 2]], window_size=5, pad_token_id=0,
    ),
    "granite": lambda: tf.GraniteConfig(**COMMON, num_key_value_heads=2, embedding_multiplier=3.0),
}  # fmt: skip

_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_STATE_SPACE: dict[str, Any] = {
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_DELTA_RULE: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": _MIXED,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip


def _granite_layers() -> list[str]:
    is_new = "linear_attention" in (tf.GraniteMoeHybridConfig(num_hidden_layers=1).layer_types or ())
    return _MIXED if is_new else ["mamba", "attention"] * 2  # as in transformers 5.10


RECURRENT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": lambda: tf.Qwen3NextConfig(**COMMON, **GROUPED, **_DELTA_RULE, **_EXPERTS),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**COMMON, **GROUPED, **_DELTA_RULE),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **COMMON, **_STATE_SPACE, num_key_value_heads=2, shared_intermediate_size=16, num_local_experts=4,
        layer_types=_granite_layers(),
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**COMMON, **_STATE_SPACE, num_key_value_heads=2, mamba_d_ssm=64),
    "jamba": lambda: tf.JambaConfig(
        **COMMON, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bamba": lambda: tf.BambaConfig(**COMMON, **_STATE_SPACE, num_key_value_heads=2, attn_layer_indices=[1, 3]),
    "mamba": lambda: tf.MambaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=NUM_BLOCKS, state_size=8, pad_token_id=0
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=NUM_BLOCKS, state_size=8, num_heads=8, head_dim=8,
        n_groups=1, chunk_size=4, pad_token_id=0,
    ),
    "lfm2": lambda: tf.Lfm2Config(
        **COMMON, num_key_value_heads=2, layer_types=["conv", "full_attention", "conv", "full_attention"]
    ),
}  # fmt: skip
"""Families that keep a state besides keys and values: they train and evaluate, and have no sessions."""
RECURRENT_STD = 0.1
"""Of their weights: with wider ones float32 gradients of plain Hugging Face are 3e-5 away from those in float64."""

_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_HEAD: dict[str, Any] = {"head_dim": 8}
_IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 4}
_TEXT: dict[str, Any] = {key: value for key, value in COMMON.items() if key != "pad_token_id"}
_SECTIONS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}

WRAPPER_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**COMMON, **GROUPED, sliding_window=5),
        vision_config=tf.SiglipVisionConfig(**_VISION, **_IMAGES), image_token_index=VOCAB - 1, mm_tokens_per_image=4,
    ),
    "mistral3": lambda: tf.Mistral3Config(
        text_config=tf.MistralConfig(**COMMON, **GROUPED), image_token_index=VOCAB - 1,
        vision_config=tf.PixtralVisionConfig(**_VISION, **_IMAGES, **_HEAD),
    ),
    "qwen2_vl": lambda: tf.Qwen2VLConfig(
        text_config={**_TEXT, **_SECTIONS, "num_key_value_heads": 2}, image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_config={"embed_dim": 16, "hidden_size": HIDDEN, "depth": 2, "num_heads": 2, "patch_size": 4},
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_SECTIONS, "num_key_value_heads": 2}, image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_config={"hidden_size": 16, "out_hidden_size": HIDDEN, "depth": 2, "num_heads": 2, "patch_size": 4,
                       "intermediate_size": 16},
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**COMMON, num_key_value_heads=2), image_token_index=VOCAB - 1,
        vision_config=tf.CLIPVisionConfig(**_VISION, **_IMAGES),
    ),
    "aya_vision": lambda: tf.AyaVisionConfig(  # does not scale its logits, as its text decoder does by itself
        text_config=tf.Cohere2Config(**COMMON, num_key_value_heads=2, sliding_window=5), image_token_index=VOCAB - 1,
        vision_config=tf.SiglipVisionConfig(**_VISION, **_IMAGES),
    ),
    "llama4": lambda: tf.Llama4Config(
        text_config=tf.Llama4TextConfig(
            **COMMON, **GROUPED, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=5
        ),
        vision_config=tf.Llama4VisionConfig(**_VISION, **_IMAGES, vision_output_dim=16, projector_input_dim=16,
                                            projector_output_dim=16),
        image_token_index=VOCAB - 1,
    ),
}  # fmt: skip
"""Multimodal models, of which the text decoder is served."""

# These have no class for sequence classification in transformers.
CAUSAL_ONLY = {"granite", "granitemoehybrid", "falcon_h1", "bamba", "mamba", "mamba2", "lfm2"}


def longrope_config(switch: int) -> PreTrainedConfig:
    """Long and short factors, beyond and up to `switch` positions, that differ so much that every mistake shows."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
    return tf.Phi3Config(
        **COMMON, num_key_value_heads=2, original_max_position_embeddings=switch, eos_token_id=1, bos_token_id=1,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10.0, "factor": 4.0, **factors},
    )  # fmt: skip


def save_tiny_checkpoint(
    config: PreTrainedConfig, folder: Path, *, seed: int = 0, std: float = 0.15, **save_options: object
) -> Path:
    """A random model in `folder`; initialised wider than usual, so that every block matters in the result."""
    torch.manual_seed(seed)
    with quiet_transformers():
        is_wrapper = config.get_text_config() is not config
        model = (AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM).from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
            elif "bias" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder, **save_options)
    return folder


def save_heavier_checkpoint(folder: Path) -> Path:
    """Heavy enough that what happens to a server shortly after a request lands while it is computed."""
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HEAVIER_HIDDEN, intermediate_size=768, num_hidden_layers=HEAVIER_BLOCKS,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return save_tiny_checkpoint(config, folder)
