"""Tiny random packed models with what real ones have: ranks of their own, paths, biases, tied embeddings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

from littlebit2 import QuantConfig, quantize_
from littlebit2.architecture.int8 import int8_
from littlebit2.checkpoint import open_checkpoint, quantization_config
from littlebit2.integrations.modules import layers_of, spec_of
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import LittleBitLinear, PackedLinear, PackedPath
from littlebit2_kernels.testing import make_packed

__all__ = ["MODELS", "VOCABULARY", "make_adapter", "make_experts", "make_model"]

VOCABULARY = 320
ADAPTER_RANK = 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: Sizes that SGLang serves on CPUs, where it pads others.
_EVEN: dict[str, Any] = {"intermediate_size": 192}

#: Family, settings of its configuration, and paths of its layers.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "one"),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "one"),
    "two-path": ("Llama", {"attention_bias": True}, "two"),
    "shared-v": ("Llama", {}, "shared"),
    "single-stage": ("Llama", {}, "single"),
    "qwen2": ("Qwen2", {}, "one"),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}, "one"),
    "phi3": ("Phi3", {}, "one"),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1}, "one"),
    "int8": ("Llama", {**_EVEN, "vocab_size": 300}, "one"),
    "int8-tied": ("Llama", {**_EVEN, "tie_word_embeddings": True}, "one"),
    "packed-head": ("Llama", {**_EVEN, "vocab_size": 300, "attention_bias": True}, "two"),
}
#: Models whose head and embedding are in int8 rows, and those with a packed head.
_INT8 = ("int8", "int8-tied")
_PACKED_HEAD = ("packed-head",)


def make_model(name: str, path: Path) -> None:
    """Write a packed checkpoint with a tokenizer whose words are ``t0``, ``t1``, ...

    Args:
        name: a key of :data:`MODELS`.
        path: the directory, which is made.
    """
    family, settings, kind = MODELS[name]
    model = _dense(family, settings)
    draw = random.Random(name)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    for module, linear in list(model.named_modules()):
        # The first down projection of each model stays dense.
        dense = module.endswith("layers.0.mlp.down_proj") or (
            "lm_head" in module and name not in _PACKED_HEAD
        )
        if isinstance(linear, nn.Linear) and not dense:
            model.set_submodule(
                module,
                LittleBitLinear.from_packed(_packed(linear, kind, draw, generator), activation="exact"),
            )
    int8 = sorted(int8_(model).stored) if name in _INT8 else []
    kept = [module for module, linear in model.named_modules() if type(linear) is nn.Linear]
    specs = [spec_of(module, layer) for module, layer in layers_of(model).items()]
    _save(model, path, {"quantization_config": quantization_config(specs, kept, (), int8)})


def make_experts(path: Path) -> None:
    """Write a mixture of experts, all of whose layers are packed."""
    model = _dense("Mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1})
    quantize_(model, QuantConfig(ranks=(16,), method="joint-itq", itq_iterations=1), progress=False)
    attach(model)
    model.save_pretrained(path)
    _save_tokenizer(path)


def make_adapter(model: Path, path: Path) -> None:
    """Write a random LoRA adapter, in peft's format, for all packed layers of a checkpoint.

    Args:
        model: directory of a checkpoint whose projections are not fused.
        path: the directory, which is made.
    """
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    with open_checkpoint(model) as checkpoint:
        for name, spec in checkpoint.layers.items():
            for part, sizes in (
                ("A", (ADAPTER_RANK, spec.shape.in_features)),
                ("B", (spec.shape.out_features, ADAPTER_RANK)),
            ):
                values = torch.randn(sizes, generator=generator) / sizes[1] ** 0.5
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": ADAPTER_RANK,
        "lora_alpha": 2 * ADAPTER_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def _dense(family: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name:
                # A tied head repeats the last token unless the layers outweigh the embedding.
                parameter.mul_(0.05 if config.tie_word_embeddings else 3)
    return model


def _packed(linear: nn.Linear, kind: str, draw: random.Random, generator: torch.Generator) -> PackedLinear:
    """A random layer of the size of ``linear``, with its bias, about as large."""
    ranks = {
        "one": [8 * draw.randint(3, 12)],
        "two": [8 * draw.randint(3, 12), 8 * draw.randint(1, 6)],
        "shared": [64, 64],
        "single": None,
    }[kind]
    sizes = linear.in_features, linear.out_features
    packed = make_packed(*sizes, ranks, share_v=kind == "shared", scale_spread=0.3, generator=generator)
    width = sum(ranks) if ranks else 1
    factor = 0.3 / width**0.5
    paths = [
        PackedPath(path.v, path.in_scale, path.out_scale * factor, path.u, path.latent_scale)
        for path in packed.paths
    ]
    return PackedLinear(tuple(paths), None if linear.bias is None else linear.bias.detach().float().clone())


def _save(model: Any, path: Path, extra: dict[str, Any]) -> None:
    path.mkdir(parents=True)
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config.update(architectures=[type(model).__name__], dtype="float32", **extra)
    (path / "config.json").write_text(json.dumps(config, indent=1, default=str))
    tied = model.config.tie_word_embeddings
    state = {
        name: one.contiguous()
        for name, one in model.state_dict().items()
        if not (tied and name.startswith("lm_head."))
    }
    save_file(state, path / "model.safetensors", {"format": "pt"})
    _save_tokenizer(path)


def _save_tokenizer(path: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t3", pad_token="t0", bos_token="t1", eos_token="t2"
    ).save_pretrained(path)
