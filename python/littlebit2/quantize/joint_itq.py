"""The latent rotation: joint iterative quantisation of both factors, and the polar factor it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from littlebit2_kernels.packing import pack_signs, unpack_signs

from ._numeric import binary_exponent, check_matrix, times_power_of_two

__all__ = ["LatentRotation", "PolarMethod", "joint_itq", "polar_factor", "random_rotation"]

PolarMethod = Literal["auto", "newton", "svd"]

#: Rows of the latent factors worked on at a time, so that their rotated copy is never whole.
_BLOCK_ROWS = 512

#: Newton's iteration needs 9 steps for a condition number of 1e16; more means it is not converging.
_NEWTON_STEPS = 20


@dataclass(frozen=True, eq=False)
class LatentRotation:
    """A rotation of the latent space and what it does to the two factors.

    Attributes:
        rotation: ``[R, R]``, orthogonal.
        a: ``[N, R]``, the rotated ``a @ rotation``.
        b: ``[R, K]``, the rotated ``rotation.T @ b``; the product with ``a`` is unchanged.
        objective: the alignment ``|Z R|_1 / (sqrt(numel) |Z|_F)`` in [0, 1] of ``Z = [a; b.T]`` under the
            starting rotation and after every iteration; 1 where all entries share one magnitude.
        converged: whether the signs of ``Z R`` stopped changing before the iterations ran out.
    """

    rotation: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    objective: tuple[float, ...]
    converged: bool


def joint_itq(
    a: torch.Tensor,
    b: torch.Tensor,
    iterations: int = 50,
    *,
    generator: torch.Generator | None = None,
    polar: PolarMethod = "auto",
    in_place: bool = False,
) -> LatentRotation:
    """Rotate the latent space so that both factors lose least to their signs (Joint-ITQ).

    LittleBit-2 (arXiv 2603.00042), internal latent rotation: from a random rotation, alternate
    ``B = sign(Z R)`` and ``R = polar(Z.T B)``, the orthogonal Procrustes solution, for
    ``Z = [a; b.T]``. Both halves of a step can only raise ``|Z R|_1``.

    Args:
        a: ``[N, R]``, float32 or float64.
        b: ``[R, K]``, like ``a``.
        iterations: most iterations; 0 keeps the random starting rotation.
        generator: CPU generator of the starting rotation, so that it is the same on every device.
        polar: see :func:`polar_factor`.
        in_place: write the result into ``a`` and ``b``, which saves the memory of a copy.

    Raises:
        TypeError: ``a`` or ``b`` is not a real floating-point tensor.
        ValueError: ``a`` and ``b`` do not share R, hold NaN or infinity, or ``iterations`` is negative.
    """
    check_matrix("a", a)
    check_matrix("b", b)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b.size(0) must equal a.size(1) = {a.shape[1]}, got {b.shape[0]}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    exponent = max(binary_exponent(a), binary_exponent(b))
    z = [*a.split(_BLOCK_ROWS), *b.T.split(_BLOCK_ROWS)]  # views of the rows of [a; b.T]
    rotation = random_rotation(a.shape[1], generator=generator).to(a)
    alignment, negative = _measure(z, exponent, rotation)
    objective = [alignment]
    converged = False
    while len(objective) <= iterations and not converged:
        rotation = polar_factor(_correlation(z, exponent, negative), polar)
        before = negative
        alignment, negative = _measure(z, exponent, rotation)
        objective.append(alignment)
        converged = all(map(torch.equal, negative, before))
    if not in_place:
        a, b = a.clone(), b.clone()
    for block in (*a.split(_BLOCK_ROWS), *b.T.split(_BLOCK_ROWS)):
        block.copy_(block @ rotation)
    return LatentRotation(rotation, a, b, tuple(objective), converged)


def _measure(
    z: list[torch.Tensor], exponent: int, rotation: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """Return the alignment of ``z rotation`` and its signs, packed, by blocks of rows."""
    sums, squares, signs = [], [], []
    for block in z:
        rotated = times_power_of_two(block, -exponent) @ rotation
        sums.append(float(rotated.abs().sum(dtype=torch.float64)))
        squares.append(float(torch.linalg.vector_norm(rotated, dtype=torch.float64)) ** 2)
        signs.append(pack_signs(rotated))
    entries = sum(block.numel() for block in z)
    largest_possible = math.sqrt(math.fsum(squares) * entries)
    return math.fsum(sums) / largest_possible if largest_possible else 0.0, signs


def _correlation(z: list[torch.Tensor], exponent: int, negative: list[torch.Tensor]) -> torch.Tensor:
    """Return ``z^T sign``, ``[R, R]``."""
    rank = z[0].shape[1]
    total = z[0].new_zeros(rank, rank)
    for block, words in zip(z, negative, strict=True):
        total.addmm_(times_power_of_two(block, -exponent).T, unpack_signs(words, rank, block.dtype))
    return total


def random_rotation(size: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return a float64 ``[size, size]`` orthogonal matrix, uniformly distributed, drawn on the CPU."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    # By its two halves: that way no more than two such matrices are held.
    reflectors, tau = torch.geqrf(gaussian)
    del gaussian
    # QR leaves the signs of R's diagonal to the library; fixing them makes Q uniform and reproducible.
    signs = torch.where(reflectors.diagonal() < 0, -1.0, 1.0).to(reflectors.dtype)
    return torch.linalg.householder_product(reflectors, tau).mul_(signs)


def polar_factor(matrix: torch.Tensor, method: PolarMethod = "auto") -> torch.Tensor:
    """Return the orthogonal polar factor ``U V^T`` of a square matrix ``U S V^T``.

    It is the rotation ``Q`` that maximises ``trace(Q^T matrix)``: the orthogonal Procrustes solution.

    ``"newton"`` runs Higham's scaled Newton iteration, which costs a handful of inverses and no SVD.
    It falls back to the SVD where the matrix is singular or too ill-conditioned for the dtype, or where
    the result is not orthogonal to rounding. ``"auto"`` is ``"svd"`` on the CPU, where the two were
    measured to cost the same, and ``"newton"`` elsewhere.

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
        method = "svd" if matrix.device.type == "cpu" else "newton"
    matrix = times_power_of_two(matrix, -binary_exponent(matrix))
    factor = _polar_newton(matrix) if method == "newton" else None
    return _polar_svd(matrix) if factor is None else factor


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
    x, scaled = matrix, True
    for step in range(_NEWTON_STEPS):
        inverse, info = torch.linalg.inv_ex(x)
        if bool(info.any()):
            return None
        if step == 0 and not _well_conditioned(x, inverse, eps):
            return None
        gain = _newton_scale(x, inverse) if scaled else 1.0
        following = torch.add(x * (gain / 2), inverse.T, alpha=0.5 / gain)
        change = float(torch.linalg.vector_norm(following - x))
        x = following
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
    """Higham's estimate of the scale that centres the singular values around 1."""
    magnitude, inverse_magnitude = x.abs(), inverse.abs()
    norms = magnitude.sum(0).amax() * magnitude.sum(1).amax()
    inverse_norms = inverse_magnitude.sum(0).amax() * inverse_magnitude.sum(1).amax()
    return float(inverse_norms / norms) ** 0.25


def _orthogonal(x: torch.Tensor, eps: float) -> bool:
    gram = x.T @ x
    gram.diagonal().sub_(1)
    return float(torch.linalg.vector_norm(gram)) <= 8 * eps * x.shape[0]  # false for NaN too
