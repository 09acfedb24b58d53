"""Sizes of tiny models by the name of the configuration's field: a table, and rules for other names."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["FILES", "IN_STAGES", "OVERRIDES", "SIZES", "by_rule", "is_layer_count", "is_stage_list"]

#: Sizes by exact name.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "dim": 64,
    "hidden_dim": 64,
    "model_dim": 64,
    "projection_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_ff": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "depth": 2,
    "num_kv_shared_layers": 0,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "d_kv": 16,
    "kv_channels": 16,
    "attention_head_size": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "prediction_length": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: Every stage doubles the filters.
_VIBEVOICE = {"num_filters": 2, "depths": [1] * 7}

#: What no table or rule knows, by model type: fields of the configuration, dotted for those of a part.
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
    },
    "csm": {"codec_config.upsample_groups": 64},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "glm5_next": {"text_config.index_topk": 16, "text_config.qk_rope_head_dim": 0},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kyutai_speech_to_text": {
        "audio_pad_token_id": 0,
        "audio_bos_token_id": 1,
        "codec_config.upsample_groups": 64,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lw_detr": {"backbone_config.num_windows": 4, "backbone_config.image_size": 64},
    "mimi": {"upsample_groups": 64},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "qwen2_5_omni": {"token2wav_config.bigvgan_config.upsample_initial_channel": 128},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 48,
        "talker_config.spatial_merge_size": 2,
    },
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "vibevoice": {
        f"{part}.{name}": value
        for part in ("audio_config", "semantic_model_config")
        for name, value in _VIBEVOICE.items()
    },
    "vibevoice_acoustic_tokenizer": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_decoder": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE,
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in _VIBEVOICE.items()
    },
    "xcodec": {
        "acoustic_model_config.encoder_hidden_size": 4,
        "acoustic_model_config.decoder_hidden_size": 64,
    },
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}

#: Files beside the weights that a model's class reads, by model type.
FILES: dict[str, dict[str, Any]] = {"qwen2_5_omni": {"spk_dict.pt": {}}}

#: Special tokens are moved into the small vocabulary, from here on.
_FIRST_TOKEN = 100

#: Fields that count the layers of a stack.
_LAYERS = re.compile(r"(?:^|_)(?:num_)?(?:hidden_)?(?:layers?|blocks|depth)$")
_NO_LAYERS = re.compile(
    r"shared|skip|index|last|start|feat_extract|every|feature_layer|first|interval|output"
)

#: Rules for integers in the order in which they are tried: a pattern of names, and the largest value.
_RULES = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"(?:^|_)(?:kv|key_value)_heads$|num_query_groups", 2),
        (r"(?:^|_)n?_?heads?$|num_head", 4),
        (r"vocab", 160),
        (r"(?:head_dim|head_size)$", 16),
        (r"lora_rank$|_rank$", 16),
        (r"num.*experts$|experts_num$", 4),
        (r"experts_per|top_?k$", 2),
        (r"expert.*(?:size|dim)$|moe.*(?:size|dim)$", 48),
        (r"(?:intermediate|ffn|mlp|feed_?forward|fc)[a-z_]*(?:size|dim)$|d_ff$|^dim_feedforward$", 96),
        (r"positions|position_embeddings$", 64),
        (
            r"(?:^|_)(?:hidden|embed|embedding|emb|model|projection|proj|width|out|channels?)_?(?:size|dim)$",
            64,
        ),
        (r"(?:hidden|embed|embedding|encoder|decoder|feature|bottleneck)[a-z_]*(?:size|dim|channels)$", 64),
        (r"^(?:d_model|embed_dim|width|dim|channels|num_filters|base_channels)$", 64),
        (r"num_queries$|query_length$|num_latents$|num_query_tokens$", 8),
        (r"^d_", 64),
        (r"attends_per_block$", 2),
        (r"context_size$", 32),
        (r"^(?:n|num)_filters$", 4),
        (r"codebook_size$|num_embeddings$", 64),
    )
)
#: Factors of widths and depths.
_FACTORS = {"width_coefficient": 0.25, "depth_coefficient": 0.2}
#: Sizes of models that work in stages.
IN_STAGES = {"image_size": 128, "patch_size": 4, "embed_dim": 32, "hidden_size": 32, "window_size": 4}
#: Fields of lists with one entry per stage, of which there are few.
_MOST_STAGES = 6
_STAGES = (
    (re.compile(r"depths$|layers$|blocks$|repeats$"), lambda values: [1] * len(values)),
    (re.compile(r"heads$"), lambda values: [2] * len(values)),
    (
        re.compile(r"(?:hidden|embed|neck|channel|dim|filter|out|width)[a-z_]*(?:sizes?|dims?|channels?|s)$"),
        lambda values: [max(16, 32 * value // max(values[0], 1) // 8 * 8) for value in values],
    ),
)


def is_stage_list(name: str, value: Any) -> bool:
    """Whether a field has one number for each stage of a model."""
    return (
        isinstance(value, (list, tuple))
        and 1 < len(value) <= _MOST_STAGES
        and all(type(one) is int for one in value)
        and any(pattern.search(name) for pattern, _ in _STAGES)
    )


def is_layer_count(name: str) -> bool:
    """Whether a field says how many layers a stack has."""
    return bool(_LAYERS.search(name)) and not _NO_LAYERS.search(name)


def by_rule(name: str, value: Any) -> Any:
    """Return a small value for a field that no table knows; the value itself where no rule applies."""
    if isinstance(value, bool):
        return value
    if name in _FACTORS and isinstance(value, float):
        return _FACTORS[name]
    if isinstance(value, int):
        if name.endswith(("_token_id", "_token_index")) and value >= SIZES["vocab_size"]:
            return _FIRST_TOKEN + sum(map(ord, name)) % (SIZES["vocab_size"] - _FIRST_TOKEN)
        if is_layer_count(name):
            return min(value, 2)
        for pattern, most in _RULES:
            if pattern.search(name):
                return min(value, most)
    if is_stage_list(name, value):
        for pattern, shrink in _STAGES:
            if pattern.search(name):
                return type(value)(shrink(value))
    return value
