"""Tiny models with experts, and models whose files have other names than their modules."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from littlebit2.quantize import QuantConfig
from littlebit2_kernels import LittleBitLinear

QUANT = QuantConfig(ranks=(16,), method="joint-itq", itq_iterations=1)

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}

#: Family: model class and sizes. Names, layouts and activations of experts differ in each.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {**_SIZES, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 16}),
    "olmoe": ("OlmoeForCausalLM", {**_MOE}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **_SIZES,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **_SIZES,
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **_SIZES,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [0],
            "pad_token_id": 0,
        },
    ),
}

#: Families whose files have other names, or whose initialization reads child linears.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", _VISION),
    "siglip": ("SiglipVisionModel", _VISION),
    "dinov2": ("Dinov2Model", {**_VISION, "use_swiglu_ffn": True}),
    "t5": (
        "T5EncoderModel",
        {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
    ),
}


#: Mixtures whose experts are not packed: model class and sizes.
UNPACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "vocab_size": 160,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 96,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 64,
            },
        },
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        {
            **_SIZES,
            "num_hidden_layers": 1,
            "kv_channels": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}


def make(name: str) -> Any:
    """A model with random weights, float32."""
    class_name, sizes = {**MIXTURES, **OTHERS, **UNPACKED}[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return model


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Inputs of a model of this module."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(3, 160, (2, 9), generator=generator)}


def run(model: Any) -> torch.Tensor:
    """The first output of a model."""
    with torch.no_grad():
        return model(**inputs_of(model))[0]


def share(model: Any) -> float:
    """The share of weights of matrices that is packed, embeddings and heads aside."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, LittleBitLinear))
    left = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 1 and not any(part in name for part in ("embed", "lm_head", "shared", "classifier"))
    )
    return packed / (packed + left)
