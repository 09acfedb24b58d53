"""Binary factorisation by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

import torch

from .binary_path import BinaryFactor, BinaryPath

__all__ = ["admm"]

#: Penalty relative to the mean squared length of the fixed factor's rows, at the first and at the last
#: iteration. Weak at first, so that signs can still change; where it ends, real and binary factors agree.
_FIRST_PENALTY, _LAST_PENALTY = 0.2, 0.8


def admm(target: torch.Tensor, path: BinaryPath, iterations: int) -> None:
    """Factorise ``target`` into scaled signs, starting from ``path``, in place.

    Double binary factorisation (DBF, arXiv 2505.11076; NanoQuant, arXiv 2602.06694): each factor in turn
    solves ``min |target - X Y|^2`` for ``X`` in the set ``Z`` of sign matrices scaled by rows and columns,
    ``Y`` being the other factor as it stands. With the scaled dual ``D`` and penalty ``rho``, one iteration
    is

        X = (target Y^T + rho (Z - D)) (Y Y^T + rho I)^-1,   Z = projection of X + D,   D = D + X - Z

    where the projection takes the signs of its argument and the best rank-1 approximation of its
    magnitudes (one alternating least-squares step, going on from the last one). The penalty grows
    geometrically. The error need not fall with every iteration; :func:`.refine` afterwards sees to the last
    bits.

    Beside ``target``, both duals, two ``R x R`` matrices and chunks of a few hundred columns are held.

    Args:
        target: ``[N, K]``, float32 or float64, magnitude about 1.
        path: the start, of the same shape and dtype; overwritten.
        iterations: number of iterations.
    """
    root = path.latent.abs().sqrt_()
    sides = (_Side(path.left, root.clone()), _Side(path.right, root * path.latent.sign()))
    for step in range(iterations):
        progress = step / max(iterations - 1, 1)
        penalty = _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** progress
        sides[0].improve(target, sides[1], penalty)
        sides[1].improve(target.T, sides[0], penalty)
    path.latent = sides[0].latent * sides[1].latent


class _Side:
    """One factor ``Z = latent * signs * scale`` ``[R, n]`` with its dual ``D``."""

    def __init__(self, factor: BinaryFactor, latent: torch.Tensor) -> None:
        self.factor = factor
        self.latent = latent
        self.dual = latent.new_zeros(latent.numel(), factor.scale.numel())

    def improve(self, target: torch.Tensor, other: _Side, penalty: float) -> None:
        """Do one iteration for this factor; ``target`` is ``[n, m]``."""
        lower = other.factor.gram(other.latent)
        rho = penalty * float(lower.diagonal().mean())
        if rho <= 0:
            return  # the other factor is zero, and so is the target
        lower.diagonal().add_(rho)
        lower = torch.linalg.cholesky(lower)
        unit = self.latent.abs()
        unit /= torch.linalg.vector_norm(unit).clamp(min=torch.finfo(unit.dtype).tiny)
        magnitudes = torch.zeros_like(unit)
        for entries in self.factor.chunks():
            dual = self.dual[:, entries]
            right = other.factor.project(target[entries], other.latent)
            right.add_(self.factor.dense(entries, self.latent).sub_(dual), alpha=rho)
            dual += torch.cholesky_solve(right, lower)
            absolute = dual.abs()
            scale = unit @ absolute
            self.factor.scale[entries] = scale
            magnitudes += absolute @ scale
            self.factor.set_signs(entries, dual)
        energy = self.factor.scale.square().sum()
        self.latent = magnitudes / torch.where(energy > 0, energy, 1)
        for entries in self.factor.chunks():
            self.dual[:, entries] -= self.factor.dense(entries, self.latent)
