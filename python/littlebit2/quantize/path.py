"""One path: a target matrix becomes signs and scales by the steps of the chosen method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from littlebit2_kernels.format import PackedPath

from .methods import Steps
from .residual import Residual
from .solvers.admm import admm
from .solvers.binary_path import BinaryPath
from .solvers.dual_svid import add_path, dual_svid
from .solvers.joint_itq import joint_itq
from .solvers.numerics import squared_norm
from .solvers.refine import refine
from .solvers.svd import truncated_factors
from .solvers.target import Target

__all__ = ["MadePath", "improve_paths", "make_paths"]

#: Refinement of one path against what all others leave, time and again: rounds for each, most turns, and the
#: relative gain of a turn at which they end.
_TURN_ROUNDS = 2
_TURNS = 4
_ENOUGH = 1e-3


@dataclass(frozen=True, eq=False)
class MadePath:
    """A path and how it came about.

    Attributes:
        path: as it is stored.
        tail_energy: what the best real approximation of its rank leaves of its target; ``None`` without SVD.
        itq_objective: see :class:`.LatentRotation`; empty without rotation.
        itq_converged: whether Joint-ITQ reached a fixed point.
    """

    path: PackedPath
    tail_energy: float | None = None
    itq_objective: tuple[float, ...] = ()
    itq_converged: bool = False


def make_paths(
    residuals: Sequence[Residual],
    rank: int,
    steps: Steps,
    generators: Sequence[torch.Generator],
) -> list[MadePath]:
    """Approximate what is left of weights of one shape by one more path each; none is subtracted yet.

    Args:
        residuals: of each layer.
        rank: of the path, the same for all.
        steps: likewise.
        generators: of each layer.
    """
    if not steps.decomposes:
        target = _stacked(residuals)
        n, k = target.shape
        magnitudes = [(total / (n * k)) ** 0.5 for total in target.totals()]
        state = BinaryPath.random(
            target.shape, rank, magnitudes, generators, dtype=target.dtype, device=target.device
        )
        return [MadePath(path) for path in _improved(target, state, steps)]
    starts = [
        _from_svd(residual, rank, steps, generator)
        for residual, generator in zip(residuals, generators, strict=True)
    ]
    if not steps.refine_rounds:
        return starts
    target = _stacked(residuals)
    state = BinaryPath.from_packed([start.path for start in starts], target.dtype)
    improved = _improved(target, state, steps)
    return [replace(start, path=path) for start, path in zip(starts, improved, strict=True)]


def _stacked(residuals: Sequence[Residual]) -> Target:
    if len(residuals) == 1:
        return residuals[0].target()
    return Target(torch.stack([residual.matrix() for residual in residuals]))


def _from_svd(residual: Residual, rank: int, steps: Steps, generator: torch.Generator) -> MadePath:
    factors = truncated_factors(residual.matrix(), rank)
    a, b, tail_energy = factors.a, factors.b, factors.tail_energy
    del factors
    residual.release()  # what follows needs the factors alone
    if steps.method == "dual-svid":
        return MadePath(dual_svid(a, b), tail_energy)
    latent = joint_itq(a, b, steps.itq_iterations, generator=generator, polar=steps.polar, in_place=True)
    objective, converged = latent.objective, latent.converged
    del latent
    return MadePath(dual_svid(a, b), tail_energy, objective, converged)


def _improved(target: Target, state: BinaryPath, steps: Steps) -> list[PackedPath]:
    if steps.admm_iterations:
        admm(target, state, steps.admm_iterations)
    refine(target, state, steps.refine_rounds)
    return state.packed()


def improve_paths(residual: torch.Tensor, paths: list[PackedPath]) -> None:
    """Refine each path in turn against what all the others leave, changing ``paths`` in place.

    Args:
        residual: ``[N, K]``, the weight less all paths; kept up to date.
        paths: at least two.
    """
    error = squared_norm(residual)
    for _ in range(_TURNS):
        for i, path in enumerate(paths):
            add_path(residual, path)
            state = BinaryPath.from_packed([path], residual.dtype)
            refine(residual, state, _TURN_ROUNDS)
            (paths[i],) = state.packed()
            add_path(residual, paths[i], -1)
        before, error = error, squared_norm(residual)
        if before - error <= _ENOUGH * before:
            break
