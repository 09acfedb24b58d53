"""Rounding of dense matrices to int8 rows with a float32 scale each, and back."""

from __future__ import annotations

import torch

__all__ = ["dequantize_rows", "quantize_rows"]

#: Rows that are rounded at a time: a float32 copy of a head is as large as a packed model.
_ROWS = 1024
_LARGEST = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to int8, each row by a scale of its own: its largest magnitude over 127.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.

    Returns:
        int8 ``[N, K]`` between -127 and 127, and float32 ``[N]``; ``int8 * scale`` differs from ``weight``
        by at most half a scale. A row of zeros has scale zero.

    Raises:
        TypeError: ``weight`` is not a floating-point matrix.
        ValueError: it holds values that are not finite.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        got = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, torch.Tensor) else weight
        raise TypeError(f"weight must be a floating-point matrix, got {got}")
    weight = weight.detach()
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        rows = weight[first : first + _ROWS].float()
        s = rows.abs().amax(1) / _LARGEST
        if not bool(torch.isfinite(s).all()):
            row = first + int(torch.nonzero(~torch.isfinite(s))[0])
            raise ValueError(f"weight must be finite, got a value in row {row} that is not")
        # A subnormal scale has no precise reciprocal: such a row counts as zeros.
        s = torch.where(s < torch.finfo(torch.float32).tiny, 0.0, s)
        scale[first : first + _ROWS] = s
        rounded[first : first + _ROWS] = (rows / torch.where(s == 0, 1.0, s)[:, None]).round()
    return rounded, scale


def dequantize_rows(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``int8 * scale`` ``[N, K]`` in ``dtype``."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        out[rows] = weight[rows].float() * scale[rows, None]
    return out
