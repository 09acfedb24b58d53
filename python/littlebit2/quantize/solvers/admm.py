"""Binary factorization by the alternating direction method of multipliers (ADMM)."""

from __future__ import annotations

import torch

from .binary_path import BinaryFactor, BinaryPath, gram, project
from .numerics import cholesky_in_place
from .target import Target, as_target

__all__ = ["admm"]

#: Penalty relative to the mean squared length of the fixed factor's rows, at the first and at the last
#: iteration. Weak at first, so that signs can still change; where it ends, real and binary factors agree.
_FIRST_PENALTY, _LAST_PENALTY = 0.2, 0.8

#: Duals of large factors are kept in half precision, which changed errors by under 0.1 %: in float32 they
#: would take as much memory as the weight.
_NARROW = torch.float16


def admm(target: torch.Tensor | Target, path: BinaryPath, iterations: int) -> None:
    """Factorize a target into scaled signs, starting from ``path``, in place.

    Double binary factorization (DBF, arXiv 2505.11076; NanoQuant, arXiv 2602.06694): each factor in turn
    solves ``min |target - X Y|^2`` for ``X`` in the set ``Z`` of sign matrices scaled by rows and columns,
    ``Y`` being the other factor as it stands. With the scaled dual ``D`` and penalty ``rho``, one iteration
    is

        X = (target Y^T + rho (Z - D)) (Y Y^T + rho I)^-1,   Z = projection of X + D,   D = D + X - Z

    where the projection takes the signs of its argument and the best rank-1 approximation of its
    magnitudes (one alternating least-squares step, going on from the last one). The penalty grows
    geometrically. The error need not fall with every iteration; :func:`.refine` afterwards sees to the last
    bits.

    The layers of a batch do not see each other. Beside ``target``, both duals (in half precision where a
    factor has more than :data:`.EXPANDED_ENTRIES` entries), one ``R x R`` matrix and chunks of a few
    hundred columns are held, for each layer.

    Args:
        target: ``[N, K]`` or, for a batch, ``[B, N, K]``; float32 or float64, magnitude about 1.
        path: the start, of the same shape and dtype; overwritten.
        iterations: number of iterations.
    """
    target = as_target(target)
    root = path.latent.abs().sqrt_()
    sides = (_Side(path.left, root.clone()), _Side(path.right, root * path.latent.sign()))
    for step in range(iterations):
        progress = step / max(iterations - 1, 1)
        penalty = _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** progress
        for axis in (0, 1):
            sides[axis].improve(target, axis, sides[1 - axis], penalty)
    path.latent = sides[0].latent * sides[1].latent


class _Side:
    """The factors ``Z = latent * signs * scale`` ``[B, R, n]`` of one side with their duals ``D``."""

    def __init__(self, factor: BinaryFactor, latent: torch.Tensor) -> None:
        self.factor = factor
        self.latent = latent  # [B, R]
        narrow = not factor.is_small and latent.dtype == torch.float32
        self.dual = torch.zeros(
            (*latent.shape, factor.scale.shape[1]),
            dtype=_NARROW if narrow else latent.dtype,
            device=latent.device,
        )

    def improve(self, target: Target, axis: int, other: _Side, penalty: float) -> None:
        """Do one iteration for this side, which is the given axis of ``target``."""
        parts = other.factor.parts(other.latent)
        inverse, rho = _regularized_inverse(gram(parts, other.latent), penalty)
        unit = self.latent.abs()
        unit /= torch.linalg.vector_norm(unit, dim=1, keepdim=True).clamp(min=torch.finfo(unit.dtype).tiny)
        unit = unit.unsqueeze(2)
        magnitudes = torch.zeros_like(self.latent)
        for entries in self.factor.chunks():
            dual = self.dual[:, :, entries].to(self.latent.dtype)
            right = project(parts, target.block(axis, entries), other.latent)
            right.addcmul_(self.factor.dense(entries, self.latent).sub_(dual), rho)
            moved = torch.baddbmm(dual, inverse, right)
            del right, dual
            absolute = moved.abs()
            # Sums of products rather than products of matrices, whose last bits depend on where in memory,
            # and so in a batch, a layer lies.
            scale = (absolute * unit).sum(1)
            self.factor.scale[:, entries] = scale
            magnitudes += absolute.mul_(scale.unsqueeze(1)).sum(2)
            self.factor.set_signs(entries, moved)
            _store(self.dual[:, :, entries], moved)
            del moved, absolute  # before the next ones are made
        energy = self.factor.scale.square().sum(1, keepdim=True)
        self.latent = magnitudes / torch.where(energy > 0, energy, 1)
        for entries in self.factor.chunks():
            dual = self.dual[:, :, entries]
            _store(dual, self.factor.dense(entries, self.latent).neg_().add_(dual))


def _regularized_inverse(system: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(system + rho I)^-1`` ``[B, R, R]``, and ``rho`` ``[B, 1, 1]``.

    The inverse by itself is a third of the work of solving for all columns, and multiplying by it a fast
    product; the penalty bounds the condition number. ``system`` is overwritten.
    """
    diagonal = system.diagonal(dim1=1, dim2=2)
    rho = penalty * diagonal.mean(1, keepdim=True)
    rho = torch.where(rho > 0, rho, 1)  # the other factor is zero: nothing moves
    diagonal += rho
    inverse, _ = cholesky_in_place(system)
    torch.cholesky_inverse(inverse, out=inverse)
    return inverse, rho.unsqueeze(2)


def _store(dual: torch.Tensor, values: torch.Tensor) -> None:
    if dual.dtype == _NARROW:
        limit = torch.finfo(_NARROW).max
        values = values.clamp_(-limit, limit)
    dual.copy_(values)
