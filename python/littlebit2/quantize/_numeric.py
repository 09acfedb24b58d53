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


def check_matrix(name: str, matrix: torch.Tensor) -> None:
    """Check that ``matrix`` is a non-empty, finite, real floating-point matrix.

    Raises:
        TypeError: not a tensor, or not of a real floating-point dtype.
        ValueError: not two-dimensional, empty, or with NaN or infinity (the first index is named).
    """
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(matrix).__name__}")
    if not matrix.is_floating_point():
        raise TypeError(f"{name} must have a real floating-point dtype, got {matrix.dtype}")
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
    return tensor * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def normalised(weight: torch.Tensor, exponent: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``weight * 2**-exponent`` as a copy in ``dtype``."""
    # The wider dtype first: neither the conversion nor the scaling can then leave the range.
    if torch.finfo(dtype).bits > torch.finfo(weight.dtype).bits:
        return times_power_of_two(weight.to(dtype), -exponent)
    return times_power_of_two(weight, -exponent).to(dtype)


def squared_norm(tensor: torch.Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
