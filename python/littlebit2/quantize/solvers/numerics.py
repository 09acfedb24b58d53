"""Shared guards and exact power-of-two scaling: the quantizer works on weights of magnitude about 1."""

from __future__ import annotations

import math

import torch

__all__ = [
    "binary_exponent",
    "check_finite",
    "check_matrix",
    "cholesky_in_place",
    "normalized",
    "squared_norm",
    "times_power_of_two",
]


#: Entries of a tensor that are looked at in one go.
_BLOCK_ENTRIES = 2**20

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_matrix(name: str, matrix: torch.Tensor) -> None:
    """Check that ``matrix`` is a non-empty, finite, dense matrix of float64, float32, float16 or bfloat16.

    Raises:
        TypeError: not a dense tensor, or not of one of these dtypes.
        ValueError: not two-dimensional, empty, on the meta device, or with NaN or infinity (the first
            index is named).
    """
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(matrix).__name__}")
    if matrix.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"{name} must have a real floating-point dtype of 16 bits or more, got {matrix.dtype}"
        )
    if matrix.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {matrix.layout}")
    if matrix.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {list(matrix.shape)}")
    check_finite(name, matrix)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` naming the first index of ``tensor`` that holds NaN or infinity."""
    if all(bool(torch.isfinite(block).all()) for block in _blocks(tensor)):
        return
    index = [int(i) for i in torch.nonzero(~torch.isfinite(tensor))[0]]
    raise ValueError(f"{name} must be finite, got {float(tensor[tuple(index)])} at index {index}")


def binary_exponent(tensor: torch.Tensor) -> int:
    """Return ``e`` with ``2**e <= max|tensor| < 2**(e+1)``, and 0 for an all-zero or empty tensor."""
    largest = max((float(block.abs().amax()) for block in _blocks(tensor) if block.numel()), default=0.0)
    return math.frexp(largest)[1] - 1 if largest else 0


def _blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a tensor along its first dimension, so that temporaries stay small beside it."""
    rows = max(_BLOCK_ENTRIES * tensor.shape[0] // max(tensor.numel(), 1), 1) if tensor.dim() else 1
    return tensor.split(rows) if tensor.dim() else (tensor,)


def times_power_of_two(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """Return ``tensor * 2**exponent``, exact wherever the result is a normal number of the dtype."""
    half = exponent // 2  # 2**exponent itself may not be representable in the dtype
    return (tensor * math.ldexp(1.0, half)).mul_(math.ldexp(1.0, exponent - half))


def normalized(
    weight: torch.Tensor, exponent: int, dtype: torch.dtype, *, in_place: bool = False
) -> torch.Tensor:
    """Return ``weight * 2**-exponent`` in ``dtype``, contiguous: a copy, or ``weight`` itself if it may."""
    # The wider dtype first: neither the conversion nor the scaling can then leave the range.
    between = dtype if torch.finfo(dtype).bits > torch.finfo(weight.dtype).bits else weight.dtype
    if in_place and weight.dtype == dtype and weight.is_contiguous():
        copy = weight
    else:
        copy = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for block, part in zip(_blocks(copy), _blocks(weight), strict=True):
        block.copy_(times_power_of_two(part.to(between), -exponent))
    return copy


def cholesky_in_place(systems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Cholesky factors of symmetric ``[B, R, R]`` matrices, in place, and LAPACK's status ``[B]``.

    LAPACK wants columns one after the other: of a symmetric matrix those are its rows.
    """
    lower = systems.mT
    info = torch.empty(systems.shape[0], dtype=torch.int32, device=systems.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower, info


def squared_norm(tensor: torch.Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64."""
    return math.fsum(float(torch.linalg.vector_norm(b, dtype=torch.float64)) ** 2 for b in _blocks(tensor))
