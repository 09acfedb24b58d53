"""Small dense checkpoints, written without building a model, and comparing what runs made of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}

#: As command-line arguments and as keyword arguments of QuantConfig: quick, and with a residual path.
QUICK = {"ranks": (16, 8), "method": "joint-itq", "itq_iterations": 3}


def llama_tensors(generator: torch.Generator, layers: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of a tiny Qwen2, which has biases on q, k and v."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(40, 32)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            tensors[f"{prefix}self_attn.{name}.weight"] = random(rows, 32)
            tensors[f"{prefix}self_attn.{name}.bias"] = random(rows)
        tensors[f"{prefix}self_attn.o_proj.weight"] = random(32, 32)
        tensors[f"{prefix}mlp.gate_proj.weight"] = random(48, 32)
        tensors[f"{prefix}mlp.up_proj.weight"] = random(48, 32)
        tensors[f"{prefix}mlp.down_proj.weight"] = random(32, 48)
        tensors[f"{prefix}input_layernorm.weight"] = random(32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = random(32)
    tensors["model.norm.weight"] = random(32)
    tensors["lm_head.weight"] = random(40, 32)
    return tensors


def write_model(path: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """Write a sharded dense checkpoint with config.json and a tokenizer file."""
    path.mkdir()
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    blocks = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": len(blocks)}))
    (path / "tokenizer_config.json").write_text("{}")
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
