"""Tiny random-weight models of every family, and what their tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from littlebit2 import quantize_
from littlebit2.quantize import QuantConfig
from littlebit2_kernels import LittleBitLinear

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that logits of different tokens are far apart.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_SIZES, "head_dim": 16}

#: Family, its config class, sizes, and the model class to test.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _SIZES, "LlamaForCausalLM"),
    "llama-tied": ("LlamaConfig", {**_SIZES, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", _SIZES, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", {**_GEMMA, "query_pre_attn_scalar": 16}, "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 16}, "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", _SIZES, "Phi3ForCausalLM"),
    "opt": (
        "OPTConfig",
        {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3},
        "OPTForCausalLM",
    ),
    "bert": ("BertConfig", _SIZES, "BertModel"),
}
GENERATIVE = [name for name in FAMILIES if name != "bert"]

#: Two paths of different ranks, one of them no multiple of the word.
RANKS = (40, 8)


def dense_model(family: str, seed: int = 0) -> Any:
    """A model with random weights, float32, biases and norms not trivial."""
    config_class, sizes, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name:
                # A tied head repeats the last token unless the layers outweigh the embedding.
                parameter.mul_(0.05 if model.config.tie_word_embeddings else 3)
    return model


def quantized_copy(model: Any) -> Any:
    """The model with every linear but the head packed, through our quantizer."""
    packed = copy.deepcopy(model)
    quantize_(packed, QuantConfig(ranks=RANKS, method="joint-itq", itq_iterations=4), progress=False)
    return packed


def reconstructed_copy(model: Any, packed: Any) -> Any:
    """The dense model with the weights that the packed one stands for."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, LittleBitLinear):
                linear = dense.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                linear.weight.copy_(layer.dequantize())
    return dense


def token_ids(length: int = 12, rows: int = 1) -> torch.Tensor:
    """Token ids ``[rows, length]`` without special ones."""
    return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(length))


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or hidden states of a model without a head, in float32."""
    with torch.no_grad():
        result = model(ids)
    return (result.logits if "logits" in result else result.last_hidden_state).float()


def greedy(model: Any, ids: torch.Tensor, **settings: Any) -> list[int]:
    """Sixteen new tokens, the same number whatever they are."""
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        min_new_tokens=16,
        **settings,
    )
    return new[0, ids.shape[1] :].tolist()


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Fail unless outputs in float32 are the same within rounding: models are fused when they are loaded."""
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) < 2e-5


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference by the largest entry."""
    return float((got - wanted).abs().max() / wanted.abs().max())
