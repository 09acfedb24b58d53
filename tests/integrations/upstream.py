"""Checkpoints in the authors' layout, written by a packer of its own: nothing of ours is used here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


def pack(signs: np.ndarray) -> torch.Tensor:
    """Words of a +-1 matrix ``[rows, cols]``: LSB first, bit 1 = -1, rows padded by +1."""
    bits = np.pad(signs < 0, ((0, 0), (0, -signs.shape[1] % 32)))
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").copy())


def random_layer(
    linear: nn.Linear, ranks: tuple[int, ...], random: np.random.Generator, *, packed: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a layer as the authors' code names them, and the dense weight that they mean."""
    n, k = linear.weight.shape
    tensors: dict[str, torch.Tensor] = {}
    weight = torch.zeros(n, k)
    for rank, suffix in zip(ranks, ("", "_R"), strict=False):
        latents = {"U": random.standard_normal((n, rank)), "V": random.standard_normal((rank, k))}
        signs = {name: np.where(latent < 0, -1, 1) for name, latent in latents.items()}
        for name in ("U", "V"):
            if packed:
                tensors[f"{name}{suffix}_packed"] = pack(signs[name])
                tensors[f"{name}{suffix}_shape"] = torch.tensor(signs[name].shape)
            else:
                tensors[f"{name}{suffix}"] = torch.from_numpy(latents[name]).bfloat16()
        scale = {
            name: torch.from_numpy(0.5 + random.random((1, size))).mul(factor).bfloat16()
            for name, size, factor in (
                ("u1", n, 1.0),
                ("u2", rank, rank**-0.5),
                ("v1", rank, k**-0.5),
                ("v2", k, 1.0),
            )
        }
        tensors |= {f"{name}{suffix}": value for name, value in scale.items()}
        u, v = (torch.from_numpy(signs[name]).float() for name in ("U", "V"))
        latent = scale["v1"].float() * scale["u2"].float()
        weight += scale["u1"].float().T * ((u * latent) @ v) * scale["v2"].float()
    tensors |= {"_eff_bit_target": torch.tensor(0.5), "_eff_bit_actual": torch.tensor(0.5)}
    tensors["_split_dim_final"] = torch.tensor(ranks[0])
    if linear.bias is not None:
        tensors["bias"] = linear.bias.detach().clone()
    return tensors, weight


def write(
    path: Path,
    model: Any,
    ranks: tuple[int, ...] = (40, 24),
    *,
    packed: bool = True,
    shards: int = 1,
    split_qkv: bool = True,
) -> None:
    """Replace the linears of ``model`` by random layers, and write these in the authors' layout.

    On return ``model`` holds the dense weights of what was written.
    """
    random = np.random.default_rng(7)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        parts = [("", module.weight.shape[0])]
        if name.endswith("qkv_proj") and split_qkv:
            config = model.config
            head = config.hidden_size // config.num_attention_heads
            sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            parts = [(f"{part}_proj", size * head) for part, size in zip("qkv", sizes, strict=True)]
        weights = []
        for part, rows in parts:
            piece = nn.Linear(module.in_features, rows, bias=module.bias is not None and not part)
            if module.bias is not None:
                piece.bias = module.bias
            layer, weight = random_layer(piece, ranks, random, packed=packed)
            full = name.removesuffix("qkv_proj") + part if part else name
            tensors |= {f"{full}.{key}": value for key, value in layer.items()}
            weights.append(weight)
        module.weight.data.copy_(torch.cat(weights))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = set(model.all_tied_weights_keys)
    for name, value in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if (owner not in linears or "lm_head" in name) and name not in tied:
            tensors[name] = value.clone()
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps(
            {**model.config.to_diff_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
        )
    )
    (path / "littlebit_config.json").write_text(
        json.dumps({"quant_func": "SmoothSign", "eff_bit": 0.5, "split_dim": 40, "residual": len(ranks) > 1})
    )
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    else:
        index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, path / file, {"format": "pt"})
