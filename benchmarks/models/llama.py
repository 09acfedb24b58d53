"""Llama models with random weights, packed or dense, of any number of layers; nothing is downloaded.

A model is made on the meta device and filled module by module, so that dense weights of a packed model never
exist. Weights are random with the magnitude that Llama is initialised with: what is timed does not depend on
them, as long as activations stay finite.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import LittleBitLinear, PackedLinear
from littlebit2_kernels.format import PackedPath, words_per_row

__all__ = [
    "LLAMA_SHAPES",
    "LlamaShape",
    "build_dense",
    "build_packed",
    "linear_macs",
    "parse_llama_shape",
    "random_packed",
    "require_transformers",
    "twin",
    "weight_bytes",
]

#: Standard deviation of a weight, that of Llama's own initialisation.
WEIGHT_STD = 0.02
#: Standard deviation of the logarithm of a random scale.
SCALE_SPREAD = 0.3

LayerMaker = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model; ``kv_heads`` heads for keys and values, by default as many as for queries."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None

    @property
    def kv_size(self) -> int:
        """Outputs of the projection to keys, or values."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)


LLAMA_SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape("llama2-7b", 4096, 11008, 32, 32, 32000),
        LlamaShape("llama2-13b", 5120, 13824, 40, 40, 32000),
        LlamaShape("llama3-8b", 4096, 14336, 32, 32, 128256, kv_heads=8),
        # For tests and trials: everything is there, nothing takes long.
        LlamaShape("tiny", 256, 704, 2, 4, 512),
    )
}


def parse_llama_shape(text: str) -> LlamaShape:
    """Return a shape by its name.

    Raises:
        ValueError: the name is unknown.
    """
    if text not in LLAMA_SHAPES:
        raise ValueError(f"shape must be one of {', '.join(LLAMA_SHAPES)}, got {text!r}")
    return LLAMA_SHAPES[text]


def require_transformers() -> None:
    """Check that transformers can be imported.

    Raises:
        RuntimeError: it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("whole-model needs the package transformers: pip install 'transformers>=5.17'")


def random_packed(
    in_features: int, out_features: int, ranks: list[int], *, std: float, generator: torch.Generator
) -> PackedLinear:
    """Make a packed layer of random signs whose dense weight has standard deviation ``std``.

    Signs are drawn as words: one number per sign, as :func:`littlebit2_kernels.testing.make_packed` draws
    them, takes minutes for a model.

    Args:
        in_features: K.
        out_features: N.
        ranks: one per path, equal ones.
        std: of an element of the dense weight.
        generator: source of randomness; the layer is made on its device.
    """

    def signs(rows: int, cols: int) -> torch.Tensor:
        words = torch.randint(
            -(2**31),
            2**31,
            (rows, words_per_row(cols)),
            dtype=torch.int32,
            generator=generator,
            device=generator.device,
        )
        if cols % 32:
            words[:, -1] &= (1 << cols % 32) - 1
        return words

    def scale(size: int, magnitude: float = 1.0) -> torch.Tensor:
        normal = torch.randn(size, generator=generator, device=generator.device)
        values = torch.exp(SCALE_SPREAD * normal - SCALE_SPREAD**2)
        return magnitude * values

    # A sum of as many +-1 products as all ranks together, each scaled three times with root mean square 1.
    latent = std / sum(ranks) ** 0.5
    return PackedLinear(
        tuple(
            PackedPath(
                v=signs(rank, in_features),
                in_scale=scale(in_features),
                out_scale=scale(out_features),
                u=signs(out_features, rank),
                latent_scale=scale(rank, latent),
            )
            for rank in ranks
        ),
        None,
    )


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


def _dense_linear(linear: nn.Linear, dtype: torch.dtype, generator: torch.Generator) -> nn.Linear:
    linear.weight = _frozen(linear.weight, dtype, 0.0, WEIGHT_STD, generator)
    return linear


def _frozen(
    like: torch.Tensor, dtype: torch.dtype, mean: float, std: float, generator: torch.Generator
) -> nn.Parameter:
    values = torch.empty(like.shape, dtype=dtype, device=generator.device)
    values.normal_(mean, std, generator=generator)
    return nn.Parameter(values, requires_grad=False)


def _skeleton(shape: LlamaShape, layers: int, dtype: torch.dtype, attention: str) -> Any:
    require_transformers()
    from transformers import LlamaConfig, LlamaForCausalLM

    # transformers declares this one for its loaders only.
    implementation: dict[str, Any] = {"attn_implementation": attention}
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        # The random model is to go on, whatever it says.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
        **implementation,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    return model.eval()


def _build(
    shape: LlamaShape, layers: int, dtype: torch.dtype, make: LayerMaker, generator: torch.Generator
) -> Any:
    model = _skeleton(shape, layers, dtype, "sdpa")
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


def twin(model: Any, shape: LlamaShape, *, layers: int | None = None, attention: str | None = None) -> Any:
    """Make a model that shares all weights and can be changed by itself.

    Args:
        model: of this module.
        shape: its sizes.
        layers: how many of its layers, the first ones; all of them by default.
        attention: implementation of attention as transformers calls it; the same one by default.
    """
    count = model.config.num_hidden_layers if layers is None else layers
    attention = model.config._attn_implementation if attention is None else attention
    other = _skeleton(shape, count, model.dtype, attention)
    for name, module in list(other.named_modules()):
        if not any(module.children()):
            other.set_submodule(name, model.get_submodule(name))
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def linear_macs(shape: LlamaShape, layers: int) -> int:
    """Weights of the dense linear layers without lm_head, that is multiply-accumulates of one token."""
    attention = 2 * shape.hidden * (shape.hidden + shape.kv_size)
    return layers * (attention + 3 * shape.hidden * shape.intermediate)
