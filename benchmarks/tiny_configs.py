"""Tiny configs of every decoder that transformers knows, made from the defaults of their classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 96
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "num_hidden_layers": 4,
    "n_layer": 4, "n_layers": 4, "num_layers": 4, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "head_dim": 8, "num_key_value_heads": 2,
    "num_kv_heads": 2, "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "moe_k": 2, "moe_topk": 2, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 5, "attention_window": 5, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_d_state": 8,
    "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_ssm": 64,
    "mamba_chunk_size": 4, "mamba_dt_rank": 4, "chunk_size": 4, "state_size": 8, "time_step_rank": 4,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "lru_width": 32,
    "first_k_dense_replace": 1, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "attention_chunk_size": 5,
    "rotary_dim": 4, "word_embed_proj_dim": 32, "embedding_size": 32, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "image_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32,
    "num_channels": 3, "out_hidden_size": 32, "projection_dim": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "num_decoder_layers": 2, "dropout": 0.0,
}  # fmt: skip


def families() -> dict[str, Any]:
    """Every model type with a causal class, or one that makes text of images, and the auto class that makes it."""
    found: dict[str, Any] = dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText)
    found |= dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    wrappers = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {name: AutoModelForImageTextToText if name in wrappers else found[name] for name in sorted(found)}


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a model of a few thousand parameters in four blocks."""
    return _small(CONFIG_MAPPING[family], _OWN.get(family, {}))


_HEADS = {"num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ALTERNATING = {"attn_layer_period": 2, "attn_layer_offset": 1}
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3",
         "youtu", "longcat_flash", "mistral4", "mistral_large4_text", "dots3_note_text", "glm5_next_text"],
        _HEADS,
    ),
    "bailing_hybrid": _HEADS | _MIXED | {"linear_key_head_dim": 8, "partial_rotary_factor": 0.5},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "granitemoehybrid": _MIXED
    if "linear_attention" in CONFIG_MAPPING["granitemoehybrid"]().layer_types
    else {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": _ALTERNATING,
    "kimi_linear": _HEADS | _MIXED | {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local", "local", "local"]},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16]},
    "molmo2": {"image_size": [16, 16]},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen4_exp_text": {"ngram_vocab_size_base": 64},
}  # fmt: skip


def _small(cls: type[PreTrainedConfig], own: dict[str, Any], depth: int = 0) -> PreTrainedConfig:
    try:
        default = cls()
    except Exception:  # some have no defaults that fit together
        default = None
    names = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    names |= set(vars(default)) if default is not None else set()
    aliases = getattr(cls, "attribute_map", None) or {}
    given = {name: value for name, value in _SMALL.items() if name in names and name not in aliases}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        made = getattr(default, name, None)
        part_class = type(made) if isinstance(made, PreTrainedConfig) else part
        if part_class is not AutoConfig and depth < 3:
            given[name] = _small(part_class, own.get(name, {}) | _OWN.get(part_class.model_type, {}), depth + 1)
    others = sorted(name for name in names if name.endswith(("_token_id", "_token_index")) and name not in given)
    given |= {name: VOCABULARY - 1 - number for number, name in enumerate(others)}  # of images and the like
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        given["rope_parameters"] = _MROPE
    parts = getattr(cls, "sub_configs", None) or {}
    return cls(**given | {name: value for name, value in own.items() if name not in parts})
