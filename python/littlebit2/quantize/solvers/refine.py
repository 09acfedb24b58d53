"""Refinement of a path: closed-form scales and exact coordinate descent on signs, in turns.

With everything else fixed, the squared error is a quadratic in ``out_scale``, in ``in_scale``, in
``latent_scale`` and in any one sign, so each has a best value in closed form and no step can raise the error.
"""

from __future__ import annotations

import torch

from .binary_path import BinaryPath, gram, project
from .numerics import cholesky_in_place
from .sign_descent import descend
from .target import Target, as_target

__all__ = ["refine"]

#: Ridge of the system for the latent scale, relative to its mean diagonal: keeps a singular one solvable in
#: the working precision.
_RIDGE = 1e-5


def refine(
    target: torch.Tensor | Target, path: BinaryPath, rounds: int, *, tolerance: float = 1e-4
) -> list[list[float]]:
    """Improve ``path`` in place as an approximation of a target.

    One round does, for the outputs and then for the inputs: best scale; one sweep of coordinate descent on
    the signs; best scale; best ``latent_scale`` (an ``R x R`` system, by Cholesky). Beside ``target``, two
    ``R x R`` matrices and chunks of a few hundred columns are held, for each layer.

    Args:
        target: ``[N, K]`` or, for a batch, ``[B, N, K]``; float32 or float64, magnitude about 1.
        path: of the same shape and dtype.
        rounds: most rounds.
        tolerance: relative gain of one round at which a layer's rounds end.

    Returns:
        For each layer, the squared error, absolute, after every half round, as summed up on the way.
    """
    target = as_target(target)
    totals = torch.tensor(target.totals(), dtype=torch.float64)
    errors: list[list[float]] = [[] for _ in range(target.size)]
    going, state = list(range(target.size)), path
    for _ in range(rounds):
        halves = [(totals - _refit(target, state, axis).cpu()).clamp_(min=0).tolist() for axis in (0, 1)]
        for i, left, right in zip(going, *halves, strict=True):
            errors[i] += [left, right]
        rest = [at for at, i in enumerate(going) if not _at_rest(errors[i], tolerance)]
        if len(rest) < len(going):
            # Layers that are at rest leave the batch, so that none depends on what the others do.
            if state is not path:
                path.assign(going, state)
            going, totals = [going[at] for at in rest], totals[rest]
            if not going:
                return errors
            state, target = path.select(going), target.select(rest)
    if state is not path:
        path.assign(going, state)
    return errors


def _at_rest(errors: list[float], tolerance: float) -> bool:
    """Whether the last round gained next to nothing; the first is compared with its own first half."""
    if len(errors) < 4:
        return False
    return errors[-3] - errors[-1] <= tolerance * errors[-3]


def _refit(target: Target, path: BinaryPath, axis: int) -> torch.Tensor:
    """Refit one factor and the latent scale; return the energies ``[B]`` that the paths then explain."""
    mine, other = path.factors if axis == 0 else path.factors[::-1]
    parts = other.parts(path.latent)
    lengths = gram(parts, path.latent)
    system = torch.zeros_like(lengths)
    explained = torch.zeros_like(path.latent)  # by each latent, [B, R]
    energy = torch.zeros(len(path.latent), dtype=torch.float64, device=path.latent.device)
    for entries in mine.chunks():
        projection = project(parts, target.block(axis, entries), path.latent)  # [B, R, c]
        signs = mine.signs(entries)
        scale = _best_scale(signs, projection, lengths)[0].unsqueeze(1)
        descend(signs, projection / torch.where(scale == 0, 1, scale), lengths)
        scale, gained = _best_scale(signs, projection, lengths)
        energy += gained
        mine.set_signs(entries, signs)
        mine.scale[:, entries] = scale
        signs.mul_(scale.unsqueeze(1))
        system.baddbmm_(signs, signs.mT)
        explained += projection.mul_(signs).sum(2)
        del projection, signs  # before the next ones are made
    system.mul_(lengths)
    del lengths
    return energy + _refit_latent(path.latent, system, explained)


def _best_scale(
    signs: torch.Tensor, projection: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares scale of every column, and the energy ``[B]`` that they explain."""
    along = (signs * projection).sum(1)
    length = (lengths @ signs).mul_(signs).sum(1)
    scale = torch.where(length > 0, along / torch.where(length > 0, length, 1), 0)
    return scale, (along.double() * scale).sum(1)


def _refit_latent(latent: torch.Tensor, system: torch.Tensor, explained: torch.Tensor) -> torch.Tensor:
    """Multiply ``latent`` by the least-squares factors; return the energies ``[B]`` gained.

    The error as a function of the factors ``x`` is ``x^T H x - 2 x^T e`` and a constant. A ridge towards the
    present ``x = 1`` shortens the step and so never makes the error rise. A system that is zero or singular
    in spite of it leaves its layer as it is.
    """
    slope = explained - system.sum(2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal.mean(1, keepdim=True)
    usable = ridge > 0
    diagonal += torch.where(usable, ridge, 1)
    lower, info = cholesky_in_place(system)
    step = torch.cholesky_solve(slope.unsqueeze(2), lower).squeeze(2)
    step = torch.where(usable & (info == 0).unsqueeze(1), step, 0)
    latent.mul_(step + 1)
    # With (H + ridge) step = slope, the gain 2 step^T slope - step^T H step is this.
    return (step * slope).sum(1, dtype=torch.float64) + (step.square() * ridge).sum(1, dtype=torch.float64)
