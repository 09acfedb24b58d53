"""Errors against the float64 reference, and the bounds that are documented for them."""

from __future__ import annotations

import torch

from benchmarks.layers.candidates import Candidate, Module
from littlebit2_kernels import PackedLinear
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, max_allowed_error, relative_error, typical_norm

__all__ = ["INT8X2_BOUND", "INT16_BOUND", "error_bound", "error_of", "precision_of", "torch_error"]

#: Documented relative error of the int16 mode where the output is float32.
INT16_BOUND = 5e-4
#: The same of the int8x2 mode.
INT8X2_BOUND = 1e-4


def precision_of(candidate: Candidate) -> str:
    """The activation mode that a candidate of ours computes in; ``auto`` is exact for float32 only."""
    activation = candidate.activation if isinstance(candidate, Module) else "exact"
    if activation == "auto":
        return "exact" if candidate.dtype == torch.float32 else "int16"
    return activation


def error_of(actual: torch.Tensor, truth: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> float:
    """Relative Frobenius error, with the norm that random signs would give as the least denominator.

    Args:
        actual: the result ``[M, N]``.
        truth: ``linear_reference(x, packed)``.
        x: the activations ``[M, K]``.
        packed: the layer.
    """
    return relative_error(actual, truth, typical_norm(x, packed))


def error_bound(
    candidate: Candidate, truth: torch.Tensor, x: torch.Tensor, packed: PackedLinear
) -> float | None:
    """Documented bound of :func:`error_of`, or ``None`` for modes whose error is only reported.

    Exact modes have the bound of the test sweep. The int16 mode has :data:`INT16_BOUND`, int8x2
    :data:`INT8X2_BOUND`, to which 16-bit dtypes add the rounding of their output.
    """
    precision = precision_of(candidate)
    if precision == "exact":
        return max_allowed_error(x, packed, truth)
    if precision in ("int16", "int8x2"):
        bound = INT16_BOUND if precision == "int16" else INT8X2_BOUND
        return bound + (0.0 if x.dtype == torch.float32 else TOLERANCE[x.dtype])
    return None


def torch_error(truth: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> float:
    """Error of torch that computes the same unpacked formula in the dtype of ``x``."""
    return error_of(linear_reference(x, packed, x.dtype), truth, x, packed)
