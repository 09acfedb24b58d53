"""Refinement of a path: closed-form scales and exact coordinate descent on signs, in turns.

With everything else fixed, the squared error is a quadratic in ``out_scale``, in ``in_scale``, in
``latent_scale`` and in any one sign, so each has a best value in closed form and no step can raise the error.
"""

from __future__ import annotations

import torch

from ._numeric import squared_norm
from .binary_path import BinaryFactor, BinaryPath
from .sign_descent import descend

__all__ = ["refine"]

#: Ridge of the system for the latent scale, relative to its mean diagonal: keeps a singular one solvable in
#: the working precision.
_RIDGE = 1e-5


def refine(target: torch.Tensor, path: BinaryPath, rounds: int, *, tolerance: float = 1e-4) -> list[float]:
    """Improve ``path`` in place as an approximation of ``target``.

    One round does, for the outputs and then for the inputs: best scale; one sweep of coordinate descent on
    the signs; best scale; best ``latent_scale`` (an ``R x R`` system, by Cholesky). Beside ``target``, three
    ``R x R`` matrices and chunks of a few hundred columns are held.

    Args:
        target: ``[N, K]``, float32 or float64, magnitude about 1.
        path: of the same shape and dtype.
        rounds: most rounds.
        tolerance: relative gain of one round at which they end.

    Returns:
        The squared error, absolute, after every half round, as summed up on the way.
    """
    total = squared_norm(target)
    errors: list[float] = []
    for _ in range(rounds):
        left = total - _refit(target, path, path.left, path.right)
        right = total - _refit(target.T, path, path.right, path.left)
        before = errors[-1] if errors else left
        errors += [max(left, 0.0), max(right, 0.0)]
        if before - right <= tolerance * before and len(errors) > 2:
            break
    return errors


def _refit(target: torch.Tensor, path: BinaryPath, mine: BinaryFactor, other: BinaryFactor) -> float:
    """Refit one factor and the latent scale; return the energy that the path then explains."""
    gram = other.gram(path.latent)
    system = torch.zeros_like(gram)
    explained = torch.zeros_like(path.latent)  # by each latent, [R]
    energy = 0.0
    for entries in mine.chunks():
        projection = other.project(target[entries], path.latent)  # [R, c]
        signs = mine.signs(entries)
        scale = _best_scale(signs, projection, gram)[0]
        descend(signs, projection / torch.where(scale == 0, 1, scale), gram)
        scale, gained = _best_scale(signs, projection, gram)
        energy += gained
        mine.set_signs(entries, signs)
        mine.scale[entries] = scale
        signs.mul_(scale)
        system.addmm_(signs, signs.T)
        explained += projection.mul_(signs).sum(1)
    system.mul_(gram)
    del gram
    return energy + _refit_latent(path.latent, system, explained)


def _best_scale(
    signs: torch.Tensor, projection: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the least-squares scale of every column, and the energy that it explains."""
    along = (signs * projection).sum(0)
    length = (gram @ signs).mul_(signs).sum(0)
    scale = torch.where(length > 0, along / torch.where(length > 0, length, 1), 0)
    return scale, float((along.double() * scale).sum())


def _refit_latent(latent: torch.Tensor, system: torch.Tensor, explained: torch.Tensor) -> float:
    """Multiply ``latent`` by the least-squares factors; return the energy gained.

    The error as a function of the factors ``x`` is ``x^T H x - 2 x^T e`` and a constant. A ridge towards the
    present ``x = 1`` shortens the step and so never makes the error rise.
    """
    ridge = _RIDGE * float(system.diagonal().mean())
    slope = explained - system.sum(1)
    if ridge <= 0:
        return 0.0
    regular = system.clone()
    regular.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(regular)
    del regular
    if int(info):
        return 0.0
    step = torch.cholesky_solve(slope.unsqueeze(1), lower).squeeze(1)
    latent.mul_(step + 1)
    return float(
        2 * (step * slope).sum(dtype=torch.float64) - (step * (system @ step)).sum(dtype=torch.float64)
    )
