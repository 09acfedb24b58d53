"""Shared guards and exact power-of-two scaling: the quantizer works on weights of magnitude about 1."""

from __future__ import annotations

import math

import torch

__all__ = [
    "binary_exponent",
    "check_finite",
    "check_matrix",
    "normalised",
    "squared_norm",
    "times_power_of_two",
]


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
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        index = [int(i) for i in torch.nonzero(bad)[0]]
        raise ValueError(f"{name} must be finite, got {float(tensor[tuple(index)])} at index {index}")


def binary_exponent(tensor: torch.Tensor) -> int:
    """Return ``e`` with ``2**e <= max|tensor| < 2**(e+1)``, and 0 for an all-zero or empty tensor."""
    largest = float(tensor.abs().amax()) if tensor.numel() else 0.0
    return math.frexp(largest)[1] - 1 if largest else 0


def times_power_of_two(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """Return ``tensor * 2**exponent``, exact wherever the result is a normal number of the dtype."""
    half = exponent // 2  # 2**exponent itself may not be representable in the dtype
    return (tensor * math.ldexp(1.0, half)).mul_(math.ldexp(1.0, exponent - half))


def normalised(weight: torch.Tensor, exponent: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``weight * 2**-exponent`` as a copy in ``dtype``."""
    # The wider dtype first: neither the conversion nor the scaling can then leave the range.
    if torch.finfo(dtype).bits > torch.finfo(weight.dtype).bits:
        return times_power_of_two(weight.to(dtype), -exponent)
    return times_power_of_two(weight, -exponent).to(dtype)


def squared_norm(tensor: torch.Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
