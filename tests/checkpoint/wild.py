"""Checkpoints as other people's code writes them, made without any of this project's own code.

The packer is the few lines that the authors' format is: row-major int32 words, least significant bit first,
a set bit for -1, rows padded with +1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

Array = npt.NDArray[np.float64]


def pack(signs: Array) -> torch.Tensor:
    rows, cols = signs.shape
    bits = np.zeros((rows, -(-cols // 32) * 32), np.uint8)
    bits[:, :cols] = signs < 0
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").copy())


@dataclass
class Path_:
    """One path: signs U ``[N, R]``, V ``[R, K]`` and scales that bfloat16 holds exactly."""

    u: Array
    v: Array
    u1: Array
    u2: Array
    v1: Array
    v2: Array

    def dense(self) -> Array:
        return (self.u * self.u1[:, None] * (self.u2 * self.v1)) @ (self.v * self.v2)


@dataclass
class Layer:
    paths: list[Path_]
    bias: Array | None = None

    def dense(self) -> Array:
        return sum((path.dense() for path in self.paths), np.zeros(()))

    def upstream(self, dtype: torch.dtype = torch.bfloat16, extras: bool = True) -> dict[str, torch.Tensor]:
        """The authors' packed tensors: ``U_packed``, and ``U_R_packed`` of the residual path."""
        state: dict[str, torch.Tensor] = {}
        for path, s in zip(self.paths, ("", "_R", "_R2"), strict=False):
            for name, matrix in (("U", path.u), ("V", path.v)):
                state[f"{name}{s}_packed"] = pack(matrix)
                state[f"{name}{s}_shape"] = torch.tensor(matrix.shape)
            for name in ("u1", "u2", "v1", "v2"):
                state[name + s] = torch.from_numpy(getattr(path, name))[None].to(dtype)
        if extras:
            state["_eff_bit_target"] = torch.tensor(0.55)
            state["_split_dim_final"] = torch.tensor(self.paths[0].u.shape[1])
            state["_eff_bit_actual"] = torch.tensor(0.5436)
        return self._with_bias(state, dtype)

    def latent(
        self, rng: np.random.Generator, dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, torch.Tensor]:
        """The authors' unpacked tensors: any magnitudes, zeros of both signs where the sign is +1."""
        state: dict[str, torch.Tensor] = {}
        for path, s in zip(self.paths, ("", "_R"), strict=False):
            for name, matrix in (("U", path.u), ("V", path.v)):
                values = torch.from_numpy(matrix * rng.uniform(0.1, 2, matrix.shape)).to(dtype)
                positive = torch.nonzero(values > 0)
                values[tuple(positive[0])], values[tuple(positive[1])] = 0.0, -0.0
                state[name + s] = values
            for name in ("u1", "u2", "v1", "v2"):
                state[name + s] = torch.from_numpy(getattr(path, name))[None].to(dtype)
        return self._with_bias(state, dtype)

    def nanoquant(self, mid: bool = True) -> dict[str, torch.Tensor]:
        """NanoQuant's tensors; ``mid`` is the optional scale of the latents."""
        (path,) = self.paths
        state = {
            "U_packed": pack(path.u),
            "V_packed": pack(path.v),
            "U_shape": torch.tensor(path.u.shape),
            "V_shape": torch.tensor(path.v.shape),
            "scale_pre": torch.from_numpy(path.v2)[None].to(torch.bfloat16),
            "scale_post": torch.from_numpy(path.u1)[None].to(torch.bfloat16),
        }
        if mid:
            state["scale_mid"] = torch.from_numpy(path.u2 * path.v1)[None].to(torch.float32)
        return self._with_bias(state, torch.bfloat16)

    def _with_bias(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if self.bias is not None:
            state["bias"] = torch.from_numpy(self.bias).to(dtype)
        return state


def random_layer(
    rng: np.random.Generator, in_features: int, out_features: int, ranks: Sequence[int], bias: bool = False
) -> Layer:
    def signs(rows: int, cols: int) -> Array:
        return rng.choice([-1.0, 1.0], (rows, cols))

    def scale(size: int) -> Array:
        # Multiples of 1/64 up to 2: exact in every 16-bit type.
        return rng.integers(1, 128, size) / 64.0

    paths = [
        Path_(
            signs(out_features, rank),
            signs(rank, in_features),
            scale(out_features),
            scale(rank),
            scale(rank),
            scale(in_features),
        )
        for rank in ranks
    ]
    return Layer(paths, scale(out_features) if bias else None)


def prefixed(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{module}.{leaf}": t for module, state in states.items() for leaf, t in state.items()}


def write(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    *,
    config: dict[str, Any] | None = None,
    littlebit: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a checkpoint directory, the tensors dealt out to ``shards`` files in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in (("config.json", config), ("littlebit_config.json", littlebit)):
        if value is not None:
            (directory / name).write_text(json.dumps(value), "utf-8")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    names = sorted(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, directory / file)
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return directory


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SETTINGS = {
    "quant_func": "SmoothSign",
    "eff_bit": 0.55,
    "split_dim": 1024,
    "residual": True,
    "kv_factor": 1.0,
    "min_split_dim": 8,
    "use_itq": True,
    "itq_n_iter": 50,
}
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def model(
    rng: np.random.Generator, paths: int = 2, bias: bool = True
) -> tuple[dict[str, Layer], dict[str, torch.Tensor]]:
    """Two layers of odd sizes, and the dense tensors around them."""
    layers = {
        Q: random_layer(rng, 48, 40, [16] * paths, bias),
        UP: random_layer(rng, 48, 100, [40] * paths),
    }
    dense = {
        "model.embed_tokens.weight": torch.from_numpy(rng.standard_normal((11, 48))).to(torch.bfloat16),
        "model.norm.weight": torch.ones(48, dtype=torch.bfloat16),
        "lm_head.weight": torch.from_numpy(rng.standard_normal((11, 48))).to(torch.bfloat16),
    }
    return layers, dense


def upstream_model(
    directory: Path,
    rng: np.random.Generator,
    *,
    paths: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    bias: bool = True,
) -> dict[str, Layer]:
    """Write a whole small checkpoint in the authors' layout; return its layers."""
    layers, dense = model(rng, paths, bias)
    tensors = prefixed({name: layer.upstream(dtype) for name, layer in layers.items()}) | dense
    write(directory, tensors, config=CONFIG, littlebit=SETTINGS | {"residual": paths == 2}, shards=shards)
    return layers
