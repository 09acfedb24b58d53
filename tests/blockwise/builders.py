"""Tiny random models with a byte-level tokenizer, and text for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from littlebit2.blockwise import BlockwiseReport, BlockwiseSettings, quantize_blockwise
from littlebit2.quantize import QuantConfig
from tests.train.builders import byte_tokenizer, write_text

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GEMMA = {
    **SIZES,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

#: Family: configuration, sizes, class. With layer types, renamed tensors of the files, biases and mixtures.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", SIZES, "Qwen2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", _GEMMA, "Gemma3ForCausalLM"),
    "gpt-neox": (
        "GPTNeoXConfig",
        {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "GPTNeoXForCausalLM",
    ),
    # Weights held transposed.
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 257, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": None, "eos_token_id": 0},
        "GPT2LMHeadModel",
    ),
    "mixtral": (
        "MixtralConfig",
        {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2},
        "MixtralForCausalLM",
    ),
}

#: Little work for each block.
QUICK: dict[str, Any] = {
    "length": 16,
    "samples": 12,
    "held_out": 3,
    "steps": 12,
    "batch_size": 4,
    "importance_samples": 8,
    "lr": 2e-3,
    "scale_lr": 5e-3,
}
CONFIG = QuantConfig(ranks=(16,), method="admm", admm_iterations=5, refine_rounds=1)


def write_model(path: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """Write a model with random weights, biases and norms, in bfloat16, whose logits are far apart."""
    config, sizes, kind = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "lm_head" in name or "embed_out" in name:
                parameter.mul_(20)
            elif "embed" not in name:
                parameter.mul_(5)
    model.to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_data(path: Path) -> Path:
    """Write text of many more tokens than a quick run uses."""
    return write_text(path, 2000)


def run(
    model: Path,
    out: Path,
    data: Path,
    *,
    changes: dict[str, Any] | None = None,
    config: QuantConfig = CONFIG,
    **options: Any,
) -> Any:
    """Quantize quickly; ``changes`` are of the settings."""
    settings = BlockwiseSettings(**{**QUICK, **(changes or {})})
    report: BlockwiseReport = quantize_blockwise(
        model, out, config, [data], settings, **{"threads": 1, "progress": False, **options}
    )
    return report
