"""``warmup``: everything that a first call would compile or load, done before it matters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .dispatch import Call, may_choose_blas
from .format import LayerShape, PackedLinear
from .functional import littlebit_linear
from .linear import LittleBitLinear
from .serving.joined import JoinedLinear

__all__ = ["WARMUP_TOKENS", "warmup"]

#: A call, its K, its device, and the same call by ``blas`` if ``auto`` may choose that.
_Call = Callable[[torch.Tensor], Any]
_Case = tuple[_Call, int, torch.device, _Call | None]

#: Numbers of tokens that reach every kernel, and every configuration of it that is not tuned.
WARMUP_TOKENS = (1, 5, 9, 17, 33, 65, 129, 513)


def warmup(
    layer: PackedLinear | nn.Module,
    dtype: torch.dtype = torch.float16,
    tokens: Sequence[int] = WARMUP_TOKENS,
    *,
    backend: str = "auto",
    activation: str = "auto",
) -> int:
    """Run a layer, or every packed layer of a model, on zeros, and wait until that is done.

    Those of a model are :class:`LittleBitLinear` and :class:`littlebit2_kernels.JoinedLinear`.

    What a backend does on a first call (Triton compiles a kernel for each configuration, libraries are
    loaded, tuned configurations are read) must not happen while a CUDA graph is captured, and takes seconds
    elsewhere.

    Args:
        layer: a packed layer, or a module.
        dtype: dtype of the activations.
        tokens: numbers of tokens to run. The default reaches every kernel, and every configuration that is
            not tuned.
        backend: for a packed layer; modules have their own.
        activation: likewise.

    Returns:
        Calls made: layers of the same shape and layout are run once.

    Raises:
        TypeError: ``layer`` is neither.
        ValueError, BackendUnavailableError: as :func:`littlebit2_kernels.littlebit_linear`.
    """
    calls = 0
    devices = set()
    for run, in_features, device, by_blas in _distinct(layer, backend, activation, dtype):
        # Which numbers of tokens `auto` gives to blas depends on the layer and the GPU.
        cases = [(run, count) for count in tokens]
        if by_blas is not None and tokens:
            cases.append((by_blas, max(tokens)))
        for call, count in cases:
            with torch.inference_mode():
                call(torch.zeros(count, in_features, dtype=dtype, device=device))
            calls += 1
        devices.add(device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return calls


def _distinct(
    layer: PackedLinear | nn.Module, backend: str, activation: str, dtype: torch.dtype
) -> Iterator[_Case]:
    def may_dequantize(shape: LayerShape, device: torch.device, backend: str, activation: str) -> bool:
        return may_choose_blas(Call(shape, 1, dtype, device, backend, activation))

    if isinstance(layer, PackedLinear):
        dequantizes = may_dequantize(layer.shape, layer.device, backend, activation)
        yield (
            lambda x: littlebit_linear(x, layer, backend, activation),
            layer.in_features,
            layer.device,
            (lambda x: littlebit_linear(x, layer, "blas")) if dequantizes else None,
        )
        return
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a PackedLinear or a module, got {type(layer).__name__}")
    seen = set()
    for module in layer.modules():
        if isinstance(module, (LittleBitLinear, JoinedLinear)):
            buffers = list(module.buffers())
            device = buffers[0].device
            native = device.type == "cpu" and module.backend != "triton"
            shapes = module.shapes if isinstance(module, JoinedLinear) else (module.shape,)
            key = (
                *(type(module), shapes, module.backend, module.activation, device),
                *(buffer.shape for buffer in buffers),  # which layers have a bias
                # Kernels are compiled for what addresses and pitches are multiples of.
                *((buffer.stride(), buffer.data_ptr() % 16) for buffer in buffers if not native),
            )
            if key not in seen:
                seen.add(key)
                dequantizes = any(
                    may_dequantize(shape, device, module.backend, module.activation) for shape in shapes
                )
                by_blas = functools.partial(_by_blas, module) if dequantizes else None
                yield module, module.in_features, device, by_blas


def _by_blas(module: LittleBitLinear | JoinedLinear, x: torch.Tensor) -> torch.Tensor:
    if isinstance(module, JoinedLinear):
        return module.call(x, backend="blas")
    return littlebit_linear(x, module.packed, "blas")
