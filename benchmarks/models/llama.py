"""Llama models with random weights, packed or dense, with any number of layers; nothing is downloaded.

A model is made on the meta device and filled module by module, so that a packed model never has dense
weights. Weights have the magnitude of Llama's own initialization: times do not depend on them, as long as
activations stay finite.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.problems import random_packed
from benchmarks.shapes import LlamaShape
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import LittleBitLinear

__all__ = [
    "WEIGHT_STD",
    "build_dense",
    "build_packed",
    "load_random",
    "require_transformers",
    "twin",
    "weight_bytes",
]

#: Standard deviation of a weight, as Llama initializes it.
WEIGHT_STD = 0.02

LayerMaker = Callable[[nn.Linear], nn.Module]


def require_transformers() -> None:
    """Check that transformers can be imported.

    Raises:
        RuntimeError: it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("whole-model needs the package transformers: pip install 'transformers>=5.17'")


def build_packed(
    shape: LlamaShape,
    layers: int,
    bpw: float,
    dtype: torch.dtype,
    *,
    paths: int = 2,
    backend: str = "auto",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Any:
    """Make a ``LlamaForCausalLM`` whose linear layers are packed; lm_head, embedding and norms are dense.

    Args:
        shape: sizes.
        layers: number of decoder layers.
        bpw: counted bits per weight of every packed layer.
        dtype: of the activations and of what is dense.
        paths: number of equal paths of a layer.
        backend: of the packed layers.
        seed: the same one makes the same model.
        device: where it is made.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def make(linear: nn.Linear) -> nn.Module:
        n, k = linear.out_features, linear.in_features
        rank = rank_for_bpw(k, n, bpw, paths=paths)
        packed = random_packed(k, n, [rank] * paths, std=WEIGHT_STD, generator=generator)
        layer = LittleBitLinear.from_packed(packed, backend=backend)
        # Now rather than at the first call: the portable tensors of all layers never exist together.
        prepacks = generator.device.type == "cpu" and backend in ("auto", "cpu")
        return layer.prepack_() if prepacks else layer

    return _build(shape, layers, dtype, make, generator)


def build_dense(
    shape: LlamaShape,
    layers: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Any:
    """Make a dense ``LlamaForCausalLM``; arguments as of :func:`build_packed`."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(linear: nn.Linear) -> nn.Module:
        return _dense_linear(linear, dtype, generator)

    return _build(shape, layers, dtype, make, generator)


def load_random(
    folder: Path,
    shape: LlamaShape,
    layers: int,
    bpw: float,
    dtype: torch.dtype,
    *,
    paths: int,
    head: str,
    device: torch.device | str = "cpu",
) -> Any:
    """Write a random checkpoint and load it, as a user's own checkpoint is loaded.

    Args:
        folder: where to write it; must stay while the model is used.
        shape: sizes.
        layers: number of decoder layers.
        bpw: counted bits per weight of every packed layer.
        dtype: of the activations and of what is dense.
        paths: number of equal paths of a layer.
        head: ``keep``; ``int8``, with the embedding; or ``packed``, with the embedding in int8.
        device: where it is loaded.
    """
    from littlebit2 import load, synthesize
    from littlebit2.architecture.names import DEFAULT_EXCLUDE

    config = _config(shape, layers, dtype).to_dict()
    synthesize(
        config,
        folder,
        bpw,
        paths=paths,
        dtype=dtype,
        exclude=() if head == "packed" else DEFAULT_EXCLUDE,
        head="int8" if head == "int8" else "keep",
        embedding="keep" if head == "keep" else "int8",
    )
    return load(folder, device=device)


def _dense_linear(linear: nn.Linear, dtype: torch.dtype, generator: torch.Generator) -> nn.Linear:
    linear.weight = _frozen(linear.weight, dtype, 0.0, WEIGHT_STD, generator)
    return linear


def _frozen(
    like: torch.Tensor, dtype: torch.dtype, mean: float, std: float, generator: torch.Generator
) -> nn.Parameter:
    values = torch.empty(like.shape, dtype=dtype, device=generator.device)
    values.normal_(mean, std, generator=generator)
    return nn.Parameter(values, requires_grad=False)


def _config(shape: LlamaShape, layers: int, dtype: torch.dtype, **more: Any) -> Any:
    require_transformers()
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        # The random model is to go on, whatever it says.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
        **more,
    )


def _skeleton(shape: LlamaShape, layers: int, dtype: torch.dtype) -> Any:
    config = _config(shape, layers, dtype, attn_implementation="sdpa")
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return model.eval()


def _build(
    shape: LlamaShape, layers: int, dtype: torch.dtype, make: LayerMaker, generator: torch.Generator
) -> Any:
    model = _skeleton(shape, layers, dtype)
    for name, module in list(model.named_modules()):
        if name == "lm_head":
            _dense_linear(module, dtype, generator)
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, make(module))
        elif "inv_freq" in module._buffers:
            # Its buffers are computed by the constructor, to no avail on the meta device.
            model.set_submodule(name, type(module)(model.config).to(generator.device))
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            norm = module.weight.dim() == 1
            module.weight = _frozen(module.weight, dtype, float(norm), WEIGHT_STD, generator)
    unfilled = [
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta
    ]
    if unfilled:
        raise RuntimeError(
            "this version of transformers has tensors that the benchmark does not fill: "
            + ", ".join(unfilled)
        )
    return model


def twin(model: Any, shape: LlamaShape, *, layers: int) -> Any:
    """Make a model of the first layers of another, which shares their weights.

    Args:
        model: of this module.
        shape: its sizes.
        layers: how many of its layers.
    """
    other = _skeleton(shape, layers, model.dtype)
    for name, module in list(other.named_modules()):
        if not any(module.children()):
            other.set_submodule(name, model.get_submodule(name))
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
