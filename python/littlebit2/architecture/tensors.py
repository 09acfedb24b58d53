"""Which tensors of a dense checkpoint are linear weights: decided from names, shapes and the configuration.

The rule, applied to every tensor; the model is not built:

1. Its name ends in ``.weight``, it is two-dimensional and of a floating-point dtype.
2. The last part of its module's name does not say that it is something else: an embedding (contains
   ``embed``, or is one of :data:`.EMBEDDINGS`), a norm (contains ``norm``) or an expert router
   (:data:`.ROUTERS`).
3. It has not ``vocab_size`` rows, which only embeddings and heads have; without effect where the
   configuration gives some other dimension the same size. The patterns decide on ``lm_head``.
4. Its name matches ``include`` and not ``exclude``; by default heads are excluded
   (:data:`.DEFAULT_EXCLUDE`).

``<module>.bias`` of ``out_features`` entries goes with its layer. Fused projections (``qkv_proj`` and
``gate_up_proj`` of Phi-3 and Phi-4) are one layer, as they are one module of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .names import CAUSAL_HEAD, TRANSPOSED, is_linear_name
from .parts import Part, Whole
from .select import DEFAULT_EXCLUDE, check_patterns, is_selected, nothing_selected

__all__ = ["FLOATS", "Int8Tensors", "LayerSource", "select_layers"]

#: Other dimensions that a configuration names.
_SIZE_FIELDS = ("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "d_model", "d_ff")

#: Dtypes of weights that can be quantized.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Int8Tensors:
    """What of a checkpoint becomes int8 rows.

    Attributes:
        rounded: full names of the tensors that are rounded.
        left_out: full names of tensors that repeat one of them: of a head that is tied to the embedding.
        notes: remarks for the user.
    """

    rounded: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerSource:
    """A linear layer as it lies in a dense checkpoint.

    Attributes:
        name: under which it is packed: that of its tensors in the files where it has its own.
        in_features: K.
        out_features: N.
        weight: where the ``[N, K]`` tensor lies.
        bias: where the ``[N]`` tensor lies, or ``None``.
        module: its name in the model; empty where no model was built.
    """

    name: str
    in_features: int
    out_features: int
    weight: Part
    bias: Part | None
    module: str = ""


def select_layers(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    config: Mapping[str, Any],
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
) -> list[LayerSource]:
    """Return the linear layers to quantize, in the order of ``tensors``.

    Args:
        tensors: shape and dtype of every tensor of the checkpoint, by full name.
        config: content of its ``config.json``.
        include: shell-style pattern or patterns on module names (without ``.weight``), case-sensitive.
        exclude: likewise; wins over ``include``.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: no layer is selected, the family stores its weights transposed, or a selected weight
            is of a dtype that cannot be quantized (float8, for example).
    """
    includes, excludes = check_patterns("include", include), check_patterns("exclude", exclude)
    if config.get("model_type") in TRANSPOSED:
        raise ValueError(
            f"config: model_type must be of a family that stores weights as [out, in], got "
            f"{config['model_type']!r}, whose Conv1D modules store them as [in, out]: install transformers, "
            "from whose model it is known which ones"
        )
    vocabulary = _telling_vocabulary(config)
    layers = []
    for name, (shape, dtype) in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2 or not dtype.is_floating_point or not is_linear_name(module):
            continue
        if shape[0] == vocabulary and not module.endswith(CAUSAL_HEAD):
            continue
        if not is_selected(module, includes, excludes):
            continue
        if dtype not in FLOATS:
            raise ValueError(
                f"{name} must be float64, float32, float16 or bfloat16, got {dtype}: the model is already "
                "quantized; start from its dense weights"
            )
        bias = f"{module}.bias"
        layers.append(
            LayerSource(
                name=module,
                in_features=shape[1],
                out_features=shape[0],
                weight=Whole(name),
                bias=Whole(bias) if bias in tensors and tensors[bias][0] == (shape[0],) else None,
            )
        )
    if not layers:
        raise ValueError(nothing_selected(includes, excludes))
    return layers


def _telling_vocabulary(config: Mapping[str, Any]) -> int | None:
    """The vocabulary's size, if it tells an embedding from a linear layer."""
    size = config.get("vocab_size")
    named = [config[field] for field in _SIZE_FIELDS if isinstance(config.get(field), int)]
    sizes = {*named, *(2 * value for value in named)}
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(head_dim, int):
        kv_heads = config.get("num_key_value_heads")
        kv_heads = kv_heads if isinstance(kv_heads, int) else heads
        sizes |= {head_dim * count for count in (heads, kv_heads, heads + 2 * kv_heads)}
    return size if isinstance(size, int) and size not in sizes else None
