"""Refinement of a path: closed-form scales and exact coordinate descent on signs, in turns.

With everything else fixed, the squared error is a quadratic in ``out_scale``, in ``in_scale``, in
``latent_scale`` and in any one sign, so each has a best value in closed form and no step can raise the error.

Rounding can, where the quadratic is singular or nearly so: the factors of a weight with fewer rows or columns
than the rank, or with repeated ones, are large and cancel. Such a step is recognized by the rank, or by the
magnitudes that its quadratic sums up (:data:`_CANCELLATION`). It is taken only if the error, measured on the
target, falls.
"""

from __future__ import annotations

import torch

from .binary_path import BinaryFactor, BinaryPath, Parts, gram, project
from .numerics import cholesky_in_place
from .sign_descent import descend
from .target import Target, as_target

__all__ = ["refine"]

#: Ridge of the system for the latent scale, relative to its mean diagonal: keeps a singular one solvable in
#: the working precision.
_RIDGE = 1e-5

#: An energy is a sum of products whose magnitudes add up to more. Where they add up to more than this many
#: times the energy of the target, rounding may hide a rise of the error. Layers of a model stay below it.
_CANCELLATION = 64.0


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
        halves = [(totals - _refit(target, state, axis, totals)).clamp_(min=0).tolist() for axis in (0, 1)]
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


def _refit(target: Target, path: BinaryPath, axis: int, totals: torch.Tensor) -> torch.Tensor:
    """Refit one factor and the latent scale.

    Args:
        target: the weights.
        path: overwritten.
        axis: of the target; says which factor.
        totals: squared norms of the weights, float64 ``[B]`` on the CPU.

    Returns:
        The energies that the paths then explain, like ``totals``.
    """
    mine, other = path.factors if axis == 0 else path.factors[::-1]
    parts = other.parts(path.latent)
    lengths = gram(parts, path.latent)
    singular = other.size < path.latent.shape[1]
    total = totals.to(path.latent).unsqueeze(1)
    magnitude = _absolute_sum(lengths, (1, 2)).unsqueeze(1)
    system = torch.zeros_like(lengths)
    explained = torch.zeros_like(path.latent)  # by each latent, [B, R]
    energy = torch.zeros(len(path.latent), dtype=torch.float64, device=path.latent.device)
    for entries in mine.chunks():
        projection = project(parts, target.block(axis, entries), path.latent)  # [B, R, c]
        signs = mine.signs(entries)
        scale = _best_scale(signs, projection, lengths)[0].unsqueeze(1)
        descend(signs, projection / torch.where(scale == 0, 1, scale), lengths)
        scale, gained = _best_scale(signs, projection, lengths)  # [B, c]
        own = torch.maximum(gained.to(total), total / mine.size)
        doubtful = _exceeds(scale.square() * magnitude, own) | singular
        if bool(doubtful.any()):
            _keep_better(target.block(axis, entries), parts, mine, entries, signs, scale, gained, doubtful)
        energy += gained.sum(1)
        mine.set_signs(entries, signs)
        mine.scale[:, entries] = scale
        signs.mul_(scale.unsqueeze(1))
        system.baddbmm_(signs, signs.mT)
        explained += projection.mul_(signs).sum(2)
        del projection, signs  # before the next ones are made
    system.mul_(lengths)
    del lengths
    magnitude = _absolute_sum(system, 2)  # [B, R]
    factors, gain = _latent_factors(system, explained)
    magnitude = (magnitude * factors.square().clamp_(min=1)).sum(1)
    doubtful = _exceeds(magnitude, total.squeeze(1)) | singular
    if bool(doubtful.any()):
        measured = _error(target, path, axis, path.latent) - _error(target, path, axis, path.latent * factors)
        lower = measured > 0  # false for NaN too
        factors = torch.where((doubtful & ~lower).unsqueeze(1), 1, factors)
        gain = torch.where(doubtful, torch.where(lower, measured, 0), gain)
    path.latent.mul_(factors)
    return (energy + gain).cpu()


def _absolute_sum(matrices: torch.Tensor, dim: int | tuple[int, int]) -> torch.Tensor:
    return torch.linalg.vector_norm(matrices, 1, dim=dim)


def _exceeds(magnitude: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Whether rounding of sums of this magnitude can be seen beside ``energy``; true for NaN too."""
    return ~(magnitude <= _CANCELLATION * energy)


def _keep_better(
    rows: torch.Tensor,
    parts: Parts,
    factor: BinaryFactor,
    entries: slice,
    signs: torch.Tensor,
    scale: torch.Tensor,
    gained: torch.Tensor,
    doubtful: torch.Tensor,
) -> None:
    """Measure doubtful columns and put back what was there where the error would not fall.

    Args:
        rows: of the target ``[B, c, n]``.
        parts: of the other factor.
        factor: as it stands.
        entries: the columns of ``factor`` that are to change.
        signs: those to take over ``[B, R, c]``; changed in place.
        scale: likewise ``[B, c]``.
        gained: energies that both explain ``[B, c]``; likewise, as measured.
        doubtful: ``[B, c]``.
    """
    before, before_scale = factor.signs(entries), factor.scale[:, entries]
    old = _errors(rows, parts, before * before_scale.unsqueeze(1))
    new = _errors(rows, parts, signs * scale.unsqueeze(1))
    back = doubtful & ~(new < old)
    torch.where(back.unsqueeze(1), before, signs, out=signs)
    torch.where(back, before_scale, scale, out=scale)
    total = torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64).square_()
    torch.where(doubtful, total - torch.where(back, old, new), gained, out=gained)


def _error(target: Target, path: BinaryPath, axis: int, latent: torch.Tensor) -> torch.Tensor:
    """Return the squared errors ``[B]`` that ``path`` makes with another latent scale."""
    mine, other = path.factors if axis == 0 else path.factors[::-1]
    parts = other.parts(latent)
    one = torch.ones_like(latent)
    total = torch.zeros(len(latent), dtype=torch.float64, device=latent.device)
    for entries in mine.chunks():
        total += _errors(target.block(axis, entries), parts, mine.dense(entries, one)).sum(1)
    return total


def _errors(rows: torch.Tensor, parts: Parts, columns: torch.Tensor) -> torch.Tensor:
    """Return ``|rows - columns^T F|^2`` of every row, float64 ``[B, c]``, for ``F`` given by parts."""
    total = torch.zeros(rows.shape[:2], dtype=torch.float64, device=rows.device)
    # On a CPU one layer after the other: a product rounds by where in memory its result lies.
    step = 1 if rows.device.type == "cpu" else len(rows)
    for entries, part in parts:
        for at in range(0, len(rows), step):
            one = slice(at, at + step)
            left = torch.baddbmm(rows[one, :, entries], columns[one].mT, part[one], alpha=-1)
            total[one] += torch.linalg.vector_norm(left, dim=2, dtype=torch.float64).square_()
    return total


def _best_scale(
    signs: torch.Tensor, projection: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares scale of every column, and the energy that each explains, ``[B, c]``."""
    along = (signs * projection).sum(1)
    length = (lengths @ signs).mul_(signs).sum(1)
    scale = torch.where(length > 0, along / torch.where(length > 0, length, 1), 0)
    return scale, along.double() * scale


def _latent_factors(system: torch.Tensor, explained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least-squares factors ``[B, R]`` of the latent scale, and the energies ``[B]`` gained.

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
    # With (H + ridge) step = slope, the gain 2 step^T slope - step^T H step is this.
    gain = (step * slope).sum(1, dtype=torch.float64) + (step.square() * ridge).sum(1, dtype=torch.float64)
    return step + 1, gain
