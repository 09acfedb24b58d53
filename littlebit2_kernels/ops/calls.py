"""Calls of the operators that load them first and spare what a call does not need.

Everything here is traceable by ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import dense, library
from .library import load_for
from .operands import Operands, flatten

__all__ = [
    "blas_linear",
    "grouped_from_operands",
    "grouped_from_prepacked",
    "linear_from_operands",
    "linear_from_prepacked",
    "triton_linear",
    "unpack",
]


def linear_from_operands(
    x: torch.Tensor, operands: Operands, bias: torch.Tensor | None, activation: int = 0
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        operands: the lists of :data:`Operands`.
        bias: float32 ``[N]`` or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS` that the device serves.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    load_for(x)
    if torch.compiler.is_compiling():
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            # The layer is linear in x, and torch knows no forward derivative of registered operators.
            # Derivatives are those of exact sums.
            y = linear_from_operands(primal, operands, bias, activation)
            return forward_ad.make_dual(y, linear_from_operands(tangent, operands, None, 1))
    if torch.is_grad_enabled() and any(t.requires_grad for t in flatten((x, *operands, bias))):
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)
    # Nothing to differentiate: step over the Python autograd kernel, which costs more than the dispatch.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)


def linear_from_prepacked(
    x: torch.Tensor, layer: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear_prepacked``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        layer: uint8 ``[bytes]`` of a :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None``.
        out_features: N.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        load_for(x)
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)
    if not library._registered:
        library.load()
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            y = linear_from_prepacked(primal, layer, bias, out_features, activation)
            # Derivatives are those of exact sums.
            return forward_ad.make_dual(y, linear_from_prepacked(tangent, layer, None, out_features, 1))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)


def blas_linear(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` by one or two of torch's matrix products, in the dtype of ``x``.

    Scales are part of the unpacked factors: factors, latents and bias are rounded to the dtype of ``x``, and
    products of ``latent_scale`` and ``out_scale`` must fit into it. Sums are torch's, whose settings of TF32
    and of reduced precision in bfloat16 and float16 hold.

    In float16, entries of factors are right to ``2**-11`` of themselves or ``2**-25``, whichever is more, and
    latents, which are about as large as ``x``, to ``2**-11`` or ``2**-25`` too: below a root mean square of
    about ``5e-4`` the latents of a token lose bits before ``x`` does. No latent overflows where the length of
    the token (the root of the sum of its squares) is at most ``2.6e5``; beyond, one may although the result
    would not. The first call of a layer, and of changed scales, reads them (a wait for the device).

    Args:
        x: float32, float16 or bfloat16.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``, with the same roundings,
        of float16 in float32; factors are unpacked anew in the backward call.

    Raises:
        ValueError: ``x`` is float16, and factors of the layer are beyond its largest number, or those of more
            than a hundredth of the channels below its smallest normal one.
        RuntimeError: the first float16 call of a layer is captured into a CUDA graph.
    """
    load_for(x)
    if torch.compiler.is_compiling():
        return torch.ops.littlebit2.blas_linear(x, *operands, bias)
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            y = blas_linear(primal, operands, bias)
            return forward_ad.make_dual(y, blas_linear(tangent, operands, None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in flatten((x, *operands, bias))):
        return torch.ops.littlebit2.blas_linear(x, *operands, bias)
    # Nothing to differentiate: the kernel itself, which autograd must not see the products of.
    with torch._C._AutoDispatchBelowAutograd():
        return dense.dense_kernel(x, *operands, bias)


def unpack(operands: Operands, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the layer as matrices of ``dtype``, without room between rows, on the layer's device.

    Returns:
        ``[first, last]`` with ``y = (x @ first.T) @ last.T``: ``sign(V) * in_scale``, of all paths
        ``[R, K]``, and ``out_scale * sign(U) * latent_scale``, of all paths ``[N, R]``. Of a layer of a
        single stage ``[last]``, ``[N, K]``, the sum of its paths.

    Raises:
        RuntimeError: an operand does not fit.
    """
    load_for(operands[0][0])
    return torch.ops.littlebit2.unpack(*operands, dense.DTYPES[dtype])


def grouped_from_operands(
    x: torch.Tensor,
    layers: Sequence[Operands],
    bias: Sequence[torch.Tensor | None],
    activation: int = 0,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.grouped_linear``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        layers: the operands of each layer, all of one stage or all of two.
        bias: float32 ``[N]`` or ``None`` of each layer.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS` that the device serves.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``.
    """
    load_for(x)
    if _has_tangent(x) or _wants_gradient(bias):
        return [
            linear_from_operands(x, operands, one, activation)
            for operands, one in zip(layers, bias, strict=True)
        ]
    lists = [
        None if layers[0][i] is None else [tensor for operands in layers for tensor in operands[i] or ()]
        for i in range(5)
    ]
    arguments = (x, *lists, list(bias), [len(operands[0]) for operands in layers], activation)
    if torch.compiler.is_compiling() or _wants_gradient((x, *lists)):
        return torch.ops.littlebit2.grouped_linear(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.grouped_linear(*arguments)


def grouped_from_prepacked(
    x: torch.Tensor,
    layers: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    out_features: Sequence[int],
    activation: int,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.grouped_linear_prepacked``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        layers: uint8 ``[bytes]`` of each :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None`` of each layer.
        out_features: N of each layer.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``.
    """
    load_for(x)
    if _has_tangent(x) or _wants_gradient(bias):
        return [
            linear_from_prepacked(x, layer, one, size, activation)
            for layer, one, size in zip(layers, bias, out_features, strict=True)
        ]
    arguments = (x, list(layers), list(bias), list(out_features), activation)
    if torch.compiler.is_compiling() or _wants_gradient((x,)):
        return torch.ops.littlebit2.grouped_linear_prepacked(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.grouped_linear_prepacked(*arguments)


def _triton_operators() -> Any:
    from ..triton import ops  # noqa: PLC0415  # Triton is imported once a call is to run there

    return ops


def _load_triton_while_tracing() -> bool:
    _triton_operators()
    return True


_load_triton_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_linear(
    x: torch.Tensor, operands: tuple[Any, ...], bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` by ``torch.ops.littlebit2.triton_linear``, which checks them.

    Args:
        x: the activations.
        operands: ``(v, u, in_scale, latent_scale, out_scale)`` of :attr:`PackedLinear.operands`.
        bias: float32 ``[N]`` or ``None``.
        activation: a name that the backend serves.
    """
    v, u, in_scale, latent_scale, out_scale = operands
    lists = (v, u or [], in_scale, latent_scale or [], out_scale)
    if torch.compiler.is_compiling():
        _load_triton_while_tracing()
        return torch.ops.littlebit2.triton_linear(x, *lists, bias, activation)
    return _triton_operators().linear(x, lists, bias, activation)


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _wants_gradient(arguments: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flatten(arguments))
