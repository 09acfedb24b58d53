"""The orthogonal polar factor: the rotation that lies closest to a square matrix."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .numerics import binary_exponent, check_matrix, times_power_of_two

__all__ = ["PolarMethod", "polar_factor"]

PolarMethod = Literal["auto", "newton", "svd"]

#: Newton's iteration needs 9 steps for a condition number of 1e16; more means it is not converging.
_NEWTON_STEPS = 20

#: Up to this dimension LAPACK's SVD is as fast as Newton's iteration on a CPU.
_SMALL = 512


def polar_factor(matrix: torch.Tensor, method: PolarMethod = "auto") -> torch.Tensor:
    """Return the orthogonal polar factor ``U V^T`` of a square matrix ``U S V^T``.

    It is the rotation ``Q`` that maximizes ``trace(Q^T matrix)``: the orthogonal Procrustes solution.

    ``"newton"`` runs Higham's scaled Newton iteration, which costs a handful of inverses and no SVD.
    It falls back to the SVD where the matrix is singular or too ill-conditioned for the dtype, or where
    the result is not orthogonal to rounding. ``"auto"`` is ``"svd"`` on the CPU, where the two were
    measured to cost the same, up to a dimension of 512; ``"newton"`` elsewhere, which needs half the memory.

    Args:
        matrix: ``[R, R]``, float32 or float64, finite.
        method: ``"auto"``, ``"newton"`` or ``"svd"``.

    Returns:
        ``[R, R]`` like ``matrix``. For a singular matrix, where the factor is not unique, one of them.

    Raises:
        TypeError: ``matrix`` is not a real floating-point tensor.
        ValueError: ``matrix`` is not square and finite, or ``method`` is unknown.
    """
    check_matrix("matrix", matrix)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got shape {list(matrix.shape)}")
    if method not in get_args(PolarMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(PolarMethod))}, got {method!r}")
    if method == "auto":
        small = matrix.shape[0] <= _SMALL and matrix.device.type == "cpu"
        method = "svd" if small else "newton"
    exponent = binary_exponent(matrix)
    if method == "newton":
        factor = _polar_newton(times_power_of_two(matrix, -exponent))
        if factor is not None:
            return factor
    return _polar_svd(times_power_of_two(matrix, -exponent))


def _polar_svd(matrix: torch.Tensor) -> torch.Tensor:
    try:
        left, _, right = torch.linalg.svd(matrix)
    except torch.linalg.LinAlgError:
        left, _, right = torch.linalg.svd(matrix.double())
    return (left @ right).to(matrix.dtype)


def _polar_newton(matrix: torch.Tensor) -> torch.Tensor | None:
    """Newton's iteration ``X <- (g X + (g X)^-T) / 2`` (Higham, 1986); ``None`` where it does not serve."""
    eps = torch.finfo(matrix.dtype).eps
    size = matrix.shape[0]
    # A step that changes x by c leaves singular values within c^2 / 2 of 1, and the Newton-Schulz step at
    # the end leaves 3/8 c^4. The Frobenius norm bounds the change of every one of them.
    close_enough = (2 * eps) ** 0.25
    x, scaled = matrix, True  # overwritten: it is the caller's normalized copy
    for step in range(_NEWTON_STEPS):
        inverse, info = torch.linalg.inv_ex(x)
        if bool(info.any()):
            return None
        if step == 0 and not _well_conditioned(x, inverse, eps):
            return None
        gain = _newton_scale(x, inverse) if scaled else 1.0
        following = inverse.T.mul_(0.5 / gain).add_(x, alpha=gain / 2)
        change = float(torch.linalg.vector_norm(x.sub_(following)))
        x = following
        del inverse, following
        # Near the solution scaling only disturbs the quadratic convergence.
        scaled = scaled and change > 0.3 * size**0.5
        if change <= close_enough:
            break
    x = torch.addmm(x, x, x.T @ x, beta=1.5, alpha=-0.5)
    return x if _orthogonal(x, eps) else None


def _well_conditioned(x: torch.Tensor, inverse: torch.Tensor, eps: float) -> bool:
    condition = float(torch.linalg.vector_norm(x)) * float(torch.linalg.vector_norm(inverse))
    return condition * eps * x.shape[0] < 1.0  # false for NaN too


def _newton_scale(x: torch.Tensor, inverse: torch.Tensor) -> float:
    """Higham's estimate of the scale that centers the singular values around 1."""
    return (_norms(inverse) / _norms(x)) ** 0.25


def _norms(matrix: torch.Tensor) -> float:
    """Return the product of the greatest absolute column sum and the greatest absolute row sum."""
    magnitude = matrix.abs()
    return float(magnitude.sum(0).amax() * magnitude.sum(1).amax())


def _orthogonal(x: torch.Tensor, eps: float) -> bool:
    gram = x.T @ x
    gram.diagonal().sub_(1)
    return float(torch.linalg.vector_norm(gram)) <= 8 * eps * x.shape[0]  # false for NaN too
