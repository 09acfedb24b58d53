"""Truncated SVD as a balanced pair of factors: the first step of the initialization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .numerics import check_matrix, squared_norm
from .partial_svd import is_partial, leading_triplets

__all__ = ["TruncatedFactors", "truncated_factors"]

#: Columns converted to float64 at a time: bounds the temporaries beside a large weight.
_BLOCK = 1024

#: Left vectors [N, r], kept singular values [r], right vectors [r, K], all singular values.
_Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TruncatedFactors:
    """The best rank-``R`` approximation ``a @ b`` of a matrix, its energy split evenly.

    Attributes:
        a: ``[N, R]``, ``U_R sqrt(S)``.
        b: ``[R, K]``, ``sqrt(S) V_R^T``.
        singular_values: float64, descending: all ``min(N, K)`` of the matrix where it was decomposed whole,
            else the first ``R``.
        tail_energy: sum of the squares of the singular values past the first ``R``.
    """

    a: torch.Tensor
    b: torch.Tensor
    singular_values: torch.Tensor
    tail_energy: float


def truncated_factors(matrix: torch.Tensor, rank: int) -> TruncatedFactors:
    """Factorize ``matrix`` into ``a @ b`` of rank ``rank`` (LittleBit, arXiv 2506.13771, initialization).

    A large float32 matrix (smaller dimension above 512, ``rank`` at most about half of it; the exact rule is
    :func:`.partial_svd.is_partial`) goes through a subspace iteration that needs little more memory than
    the factors. Its ``a @ b`` leaves at most a thousandth or so more energy than the best one.

    Any other float32 matrix goes through the eigendecomposition of its smaller Gram matrix in float64,
    which is as accurate as a float32 SVD down to 1e-8 of the largest singular value, and faster. A float64
    matrix goes through an SVD. Each steps in for the others if LAPACK does not converge.

    The sign of every singular pair is fixed (the entry of largest magnitude in each column of ``a``
    is positive). Directions past the numerical rank of ``matrix`` are exact zeros in ``a`` and ``b``,
    also where ``rank`` exceeds ``min(N, K)``.

    Args:
        matrix: ``[N, K]``, float32 or float64, finite.
        rank: R, at least 1.

    Returns:
        The factors, ``a`` and ``b`` in the dtype and on the device of ``matrix``.

    Raises:
        TypeError: ``matrix`` is not float32 or float64.
        ValueError: ``matrix`` is not a non-empty matrix or holds NaN or infinity (the first index is
            named), or ``rank`` is below 1.
        RuntimeError: neither decomposition converged.
    """
    check_matrix("matrix", matrix)
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrix must be float32 or float64, got {matrix.dtype}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if is_partial(matrix.shape[0], matrix.shape[1], rank, matrix.dtype):
        with contextlib.suppress(torch.linalg.LinAlgError):
            return _partial(matrix, rank)
    decompositions: list[Callable[[torch.Tensor, int], _Triplets]] = [_by_gram, _by_svd]
    if matrix.dtype == torch.float64:
        decompositions.reverse()
    failure: Exception | None = None
    for decompose in decompositions:
        try:
            left, kept, right, spectrum = decompose(matrix, min(rank, *matrix.shape))
        except torch.linalg.LinAlgError as error:
            failure = error
        else:
            return _balance(left, kept, right, spectrum, rank, matrix.dtype)
    raise RuntimeError(
        f"matrix of shape {list(matrix.shape)} could be decomposed neither by SVD nor by an "
        "eigendecomposition of its Gram matrix: LAPACK did not converge"
    ) from failure


def _partial(matrix: torch.Tensor, rank: int) -> TruncatedFactors:
    left, values, right = leading_triplets(matrix, rank)
    half = values.sqrt().to(matrix.dtype)
    half_signed = torch.where(left.amax(0) < -left.amin(0), -half, half)
    tail = max(squared_norm(matrix) - float(values.square().sum()), 0.0)
    # In place: the factors are all that may stand beside the matrix.
    return TruncatedFactors(left.mul_(half_signed), right.mul_(half_signed.unsqueeze(1)), values, tail)


def _by_svd(matrix: torch.Tensor, rank: int) -> _Triplets:
    left, spectrum, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank], spectrum[:rank], right[:rank], spectrum


def _by_gram(matrix: torch.Tensor, rank: int) -> _Triplets:
    if matrix.shape[0] > matrix.shape[1]:
        left, kept, right, spectrum = _by_gram(matrix.T, rank)
        return right.T, kept, left.T, spectrum
    gram = matrix.new_zeros((matrix.shape[0],) * 2, dtype=torch.float64)
    for block in matrix.split(_BLOCK, dim=1):
        wide = block.double()
        gram.addmm_(wide, wide.T)
    energy, vectors = torch.linalg.eigh(gram)
    left = vectors[:, -rank:].flip(1).contiguous()
    right = torch.cat([left.T @ block.double() for block in matrix.split(_BLOCK, dim=1)], dim=1)
    # The norms of the projected rows lose nothing to squaring, unlike the eigenvalues.
    kept = torch.linalg.vector_norm(right, dim=1)
    spectrum = energy.flip(0).clamp(min=0).sqrt()
    spectrum[:rank] = kept
    return left, kept, right / _nonzero(kept).unsqueeze(1), spectrum.sort(descending=True).values


def _balance(
    left: torch.Tensor,
    kept: torch.Tensor,
    right: torch.Tensor,
    spectrum: torch.Tensor,
    rank: int,
    dtype: torch.dtype,
) -> TruncatedFactors:
    cutoff = torch.finfo(torch.float64).eps * max(left.shape[0], right.shape[1]) * spectrum[0]
    half = torch.where(kept > cutoff, kept, 0).sqrt()
    peak = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    half_signed = torch.where(peak < 0, -half, half)
    missing = rank - left.shape[1]
    a = torch.nn.functional.pad(left * half_signed, (0, missing))
    b = torch.nn.functional.pad(right * half_signed.unsqueeze(1), (0, 0, 0, missing))
    return TruncatedFactors(a.to(dtype), b.to(dtype), spectrum, float(spectrum[rank:].square().sum()))


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values, 1)
