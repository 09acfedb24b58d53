"""The leading singular triplets of a large float32 matrix, in little more memory than they take."""

from __future__ import annotations

import math

import torch

from .numerics import binary_exponent, times_power_of_two

__all__ = ["is_partial", "leading_triplets"]

#: Matrices up to this smaller dimension are decomposed whole: that is as fast, and what it takes is small.
_SMALL = 512
#: A basis of a larger share of the smaller dimension saves nothing over the whole decomposition.
_LARGEST_SHARE = 0.6
#: Columns of the basis, and rows of thin matrices, worked on at a time: bounds every temporary.
_BLOCK = 128
_ROUNDS = 8
#: Relative gain of captured energy between two rounds at which they end.
_ENOUGH = 2e-4
_LARGEST_DEGREE = 6
#: A basis that was made orthonormal twice has an independence close to 1 (:func:`_orthonormalize`).
_INDEPENDENT = 0.1
#: Energy of a direction, relative to the largest, that is rounding.
_DEPENDENT = 1e-6
#: What float32 can hold beside the largest direction when a filter has amplified that.
_LARGEST_GROWTH = 1e4


def is_partial(rows: int, cols: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether :func:`leading_triplets` is to be used rather than a whole decomposition.

    It is for float32, where the smaller dimension is above 512 and ``rank`` with its reserve
    (:func:`_basis_size`) at most 0.6 of it.
    """
    smaller = min(rows, cols)
    return (
        dtype == torch.float32 and smaller > _SMALL and _basis_size(rank, smaller) <= _LARGEST_SHARE * smaller
    )


def leading_triplets(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ``rank`` leading singular triplets by subspace iteration with Chebyshev filters.

    A basis of ``rank`` and some more directions of the shorter side is filtered by polynomials of
    ``matrix matrix^T`` (Zhou, Saad, Tiago and Chelikowsky, 2006), which on flat spectra, where powers hardly
    converge, need far fewer products. Rounds end when they gain next to no energy. Products are float32,
    in blocks; inner products of the basis, and the last small eigenproblem, float64. The start is random
    under a seed of its own, so the result depends on ``matrix`` alone.

    Beside ``matrix``, it takes about two bases and a few ``[l, l]`` systems, ``l`` the size of the basis.

    Args:
        matrix: ``[N, K]``, float32, finite, any strides.
        rank: R, at most ``min(N, K)``.

    Returns:
        Left vectors ``[N, R]``, singular values float64 ``[R]``, descending, and right
        vectors ``[R, K]``. Values below the resolution of float32, ``2e-6`` of the largest, are 0.

    Raises:
        torch.linalg.LinAlgError: LAPACK did not converge.
    """
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = leading_triplets(matrix.T, rank)
        return right.T, values, left.T
    operator = _Squared(matrix, binary_exponent(matrix))
    basis = _basis(operator, rank)
    _, vectors = _eigh(operator.gram_of_projection(basis))
    vectors = vectors[:, -rank:].flip(1).float()
    left = basis @ vectors
    del basis, vectors
    right = torch.empty(rank, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for columns in _blocks(matrix.shape[1]):
        right[:, columns] = operator.project(left, columns)
    norms = [torch.linalg.vector_norm(right[r], dim=1, dtype=torch.float64) for r in _blocks(rank)]
    values = torch.cat(norms)  # by blocks: in float64 the whole would be as large as both factors
    values = torch.where(values > 16 * torch.finfo(torch.float32).eps * values.max(), values, 0)
    right.div_(torch.where(values > 0, values, 1).float().unsqueeze(1))
    # Their order is that of the eigenvalues but for rounding, which moves no vector: that would take copies.
    values = values.sort(descending=True).values
    return left, times_power_of_two(values, operator.exponent), right


class _Squared:
    """``W W^T`` for ``W = matrix 2^-exponent``; neither is formed."""

    def __init__(self, matrix: torch.Tensor, exponent: int) -> None:
        self.matrix = matrix  # [n, k], n <= k
        self.exponent = exponent

    def _scaled(self, thin: torch.Tensor, exponent: int) -> torch.Tensor:
        return times_power_of_two(thin, -exponent) if exponent else thin

    def project(self, left: torch.Tensor, columns: slice) -> torch.Tensor:
        """Return ``left^T W`` ``[l, columns]``."""
        return left.T @ self._scaled(self.matrix[:, columns], self.exponent)

    def __call__(self, block: torch.Tensor) -> torch.Tensor:
        """Return ``W W^T block`` for a few columns ``[n, c]``."""
        half = self.exponent // 2
        other = self._scaled(self.matrix.T @ self._scaled(block, half), self.exponent - half)
        return self._scaled(self.matrix @ self._scaled(other, half), self.exponent - half)

    def gram_of_projection(self, basis: torch.Tensor) -> torch.Tensor:
        """Return ``basis^T W W^T basis`` in float64 ``[l, l]``."""
        gram = basis.new_zeros((basis.shape[1],) * 2, dtype=torch.float64)
        for columns in _blocks(self.matrix.shape[1]):
            wide = self.project(basis, columns).double()
            gram.addmm_(wide, wide.T)
        return gram


def _basis_size(rank: int, smaller: int) -> int:
    """Directions past ``rank`` keep the last of its own from being cut off half converged."""
    return min(rank + max(16, rank // 16), smaller)


def _basis(operator: _Squared, rank: int) -> torch.Tensor:
    """Return an orthonormal basis ``[n, l]`` that holds the leading left vectors."""
    n = operator.matrix.shape[0]
    size = _basis_size(rank, n)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(n, size, generator=generator).to(operator.matrix.device)
    for columns in _blocks(size):
        basis[:, columns] = operator(basis[:, columns])
    _orthonormalize(basis)
    captured = 0.0
    for _ in range(_ROUNDS):
        image = torch.empty_like(basis)
        for columns in _blocks(size):
            image[:, columns] = operator(basis[:, columns])
        energies, vectors = _eigh(_inner(basis, image).float())
        # Columns that are close to singular vectors differ by scales, which normalizing takes out.
        _times(basis, vectors)
        _times(image, vectors)
        before, captured = captured, float(energies[-rank:].clamp(min=0).sum(dtype=torch.float64))
        if captured - before <= _ENOUGH * captured:
            break
        basis = _filtered(operator, basis, image, float(energies[0]), float(energies[-1]))
        del image
        _orthonormalize(basis)
    if _orthonormalize(basis) < _INDEPENDENT:
        _drop_dependent(basis)
    return basis


def _filtered(
    operator: _Squared, basis: torch.Tensor, image: torch.Tensor, cut: float, top: float
) -> torch.Tensor:
    """Return a Chebyshev polynomial of the operator, small on ``[0, cut]``, times ``basis``.

    Args:
        operator: A.
        basis: ``X`` ``[n, l]``, overwritten.
        image: ``A X``, overwritten.
        cut: the smallest energy that the basis holds.
        top: the largest.
    """
    half = max(cut, 1e-6 * top) / 2
    # T_m(x) grows as cosh(m arccosh x): with a dominant direction, one step is all that float32 stands.
    steepness = math.acosh(max((top - half) / half, 1 + 1e-6))
    degree = max(1, min(_LARGEST_DEGREE, int(math.acosh(_LARGEST_GROWTH) / steepness)))
    previous, current = basis, image.sub_(basis, alpha=half).div_(half)
    for _ in range(degree - 1):
        for columns in _blocks(basis.shape[1]):
            block = current[:, columns]
            step = operator(block).div_(half).sub_(block).mul_(2)
            previous[:, columns] = step.sub_(previous[:, columns])
        previous, current = current, previous
    return current


def _drop_dependent(basis: torch.Tensor) -> None:
    """Make the columns orthonormal or zero in place, by an eigendecomposition of their inner products.

    A matrix of a rank below the size of the basis can leave columns that are parallel to the last bit.
    """
    energies, vectors = _eigh(_inner(basis, basis))
    kept = energies > _DEPENDENT * energies[-1]
    _times(basis, (vectors * torch.where(kept, energies, torch.inf).rsqrt()).float())


def _orthonormalize(basis: torch.Tensor) -> float:
    """Make the columns orthonormal in place, by Cholesky; columns that are zero, or all but, become small.

    Returns:
        How independent the columns were: 1 where they were orthogonal, 0 where one depended on the others.
    """
    gram = _inner(basis, basis)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1)
    gram.div_(lengths).div_(lengths.unsqueeze(1))
    gram.diagonal().add_(torch.finfo(torch.float64).eps * 64 * gram.shape[0])
    lower = torch.linalg.cholesky(gram)
    del gram
    independence = float(lower.diagonal().min())
    # Solved in the place of the identity, by columns as LAPACK wants it.
    inverse = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device).T
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    _times(basis, inverse.div_(lengths).T.float())
    return independence


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues and eigenvectors of a symmetric matrix, in its place; its lower triangle counts.

    LAPACK's workspace is two such matrices already.
    """
    by_columns = matrix.mT  # as LAPACK wants it; what is read is then the upper triangle of ``matrix``
    energies = matrix.new_empty(matrix.shape[0])
    torch.linalg.eigh(by_columns, UPLO="U", out=(energies, by_columns))
    return energies, by_columns


def _inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left^T right`` ``[l, l]`` in float64."""
    product = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float64)
    for rows in _blocks(left.shape[0]):
        product.addmm_(left[rows].double().T, right[rows].double())
    return product


def _times(thin: torch.Tensor, square: torch.Tensor) -> None:
    """Multiply ``thin`` ``[n, l]`` by ``square`` ``[l, l]`` in place."""
    for rows in _blocks(thin.shape[0]):
        thin[rows] = thin[rows] @ square


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
