"""One path: a target matrix becomes signs and scales by the steps of the chosen method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from littlebit2_kernels.format import PackedPath

from ._numeric import squared_norm
from .admm import admm
from .binary_path import BinaryPath
from .dual_svid import add_path, dual_svid
from .joint_itq import joint_itq
from .methods import Steps
from .refine import refine
from .residual import Residual
from .svd import truncated_factors

if TYPE_CHECKING:
    from .config import QuantConfig

__all__ = ["MadePath", "improve_paths", "make_path"]

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


def make_path(
    residual: Residual, rank: int, steps: Steps, generator: torch.Generator, config: QuantConfig
) -> MadePath:
    """Approximate what is left of a weight by one more path; it is not subtracted yet."""
    if steps.method == "admm" and config.admm_start == "random":
        target = residual.matrix()
        magnitude = (squared_norm(target) / target.numel()) ** 0.5
        state = BinaryPath.random(target, rank, magnitude, generator)
        return MadePath(_improved(target, state, steps))
    start = _from_svd(residual, rank, steps, generator, config)
    if not steps.refine_rounds:
        return start
    target = residual.matrix()
    state = BinaryPath.from_packed(start.path, target.dtype)
    return MadePath(
        _improved(target, state, steps), start.tail_energy, start.itq_objective, start.itq_converged
    )


def _from_svd(
    residual: Residual, rank: int, steps: Steps, generator: torch.Generator, config: QuantConfig
) -> MadePath:
    factors = truncated_factors(residual.matrix(), rank)
    a, b, tail_energy = factors.a, factors.b, factors.tail_energy
    del factors
    residual.release()  # what follows needs the factors alone
    if steps.method == "dual-svid":
        return MadePath(dual_svid(a, b), tail_energy)
    latent = joint_itq(a, b, config.itq_iterations, generator=generator, polar=config.polar, in_place=True)
    objective, converged = latent.objective, latent.converged
    del latent
    return MadePath(dual_svid(a, b), tail_energy, objective, converged)


def _improved(target: torch.Tensor, state: BinaryPath, steps: Steps) -> PackedPath:
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
            state = BinaryPath.from_packed(path, residual.dtype)
            refine(residual, state, _TURN_ROUNDS)
            paths[i] = state.packed()
            add_path(residual, paths[i], -1)
        before, error = error, squared_norm(residual)
        if before - error <= _ENOUGH * before:
            break
