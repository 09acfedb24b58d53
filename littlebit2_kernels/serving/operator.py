"""``littlebit2::joined_linear_auto``: layers of packed words on one x, by the backend that suits this call.

The choice goes by the number of tokens and is made when the operator runs. Made in Python outside of an
operator, it would be that of the tokens with which a graph was traced.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

from ..dispatch import ACTIVATIONS, choose_for, choose_for_group
from ..format import LayerShape
from ..functional import run
from ..ops import calls
from ..ops.joined import joined_backward, joined_fake, joined_setup
from ..ops.library import load
from ..ops.operands import Operands

__all__ = ["register"]

_NAME = "littlebit2::joined_linear_auto"
_SCHEMA = (
    "(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] out_scale, "
    "Tensor?[] bias, int[] paths, int[] shares, str backend, str activation) -> Tensor"
)

_lock = threading.Lock()
_library: torch.library.Library | None = None


def register() -> None:
    """Define the operator in this process, as a compiled graph that calls it needs; later calls do nothing.

    Raises:
        NativeLibraryError: the compiled library is missing or cannot be loaded.
    """
    global _library
    if _library is not None:
        return
    load()
    with _lock:
        if _library is None:
            library = torch.library.Library("littlebit2", "FRAGMENT")
            library.define(f"joined_linear_auto{_SCHEMA}")
            for key in ("CPU", "CUDA"):
                library.impl("joined_linear_auto", _joined_linear_auto, key)
            torch.library.register_fake(_NAME, _fake, lib=library)
            torch.library.register_autograd(_NAME, joined_backward, setup_context=joined_setup, lib=library)
            _library = library


def _fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return joined_fake(x, *arguments[:7])


def _joined_linear_auto(
    x: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor] | None,
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor] | None,
    out_scale: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    paths: list[int],
    shares: list[int],
    backend: str,
    activation: str,
) -> torch.Tensor:
    # Nothing here waits for the device, so the call can be captured into a CUDA graph once its kernels are
    # loaded and, in Triton, compiled: littlebit2_kernels.warmup does that.
    layers: list[Operands] = []
    shapes: list[LayerShape] = []
    first = 0
    for count in paths:
        part = slice(first, first + count)
        first += count
        operands: Operands = (
            v[part],
            None if u is None else u[part],
            in_scale[part],
            None if latent_scale is None else latent_scale[part],
            out_scale[part],
        )
        layers.append(operands)
        ranks = None if u is None else tuple(words.shape[0] for words in v[part])
        sizes = operands[2][0].shape[-1], operands[4][0].shape[-1]
        shapes.append(_shape(*sizes, ranks, tuple(shares[part])))
    choice = choose_for_group(x, shapes, backend, activation, prepacked=False)
    if choice is not None and choice.backend in ("cpu", "cuda") and not choice.prepack:
        return calls.joined_linear(x, layers, bias, ACTIVATIONS[choice.activation])
    # Backends that write outputs of their own.
    out = x.new_empty((*x.shape[:-1], sum(shape.out_features for shape in shapes)))
    begin = 0
    for operands, one_bias, shape in zip(layers, bias, shapes, strict=True):
        own = choose_for(x, shape, backend, activation, prepacked=False) if choice is None else choice
        end = begin + shape.out_features
        out[..., begin:end] = run(x, operands, one_bias, shape, own)
        begin = end
    return out


@functools.lru_cache(maxsize=4096)
def _shape(
    in_features: int, out_features: int, ranks: tuple[int, ...] | None, shares: tuple[int, ...]
) -> LayerShape:
    return LayerShape(in_features, out_features, ranks, shares)
