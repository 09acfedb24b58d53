"""The methods by name, what they cost, and what ``"auto"`` does.

Costs are counted from shapes, never measured: the choice, and with it every bit of the result, is the same on
every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .solvers.polar import PolarMethod

__all__ = ["Method", "Start", "Steps", "iteration_operations", "resolve_steps", "uses_one_path"]

#: ``"dual-svid"``: LittleBit. ``"joint-itq"``: LittleBit-2. ``"refine"``: Joint-ITQ, then closed-form scales
#: and sign descent. ``"admm"``: binary factorization by ADMM, then the same. ``"auto"``: admm, in budget.
Method = Literal["auto", "admm", "refine", "joint-itq", "dual-svid"]

#: Where ADMM starts: from Joint-ITQ, or from random signs, which needs no SVD.
Start = Literal["joint-itq", "random"]

#: Operations a second that ``budget_seconds`` stands for: about what one core does in large float32 products.
NOMINAL_RATE = 50e9
#: What ``"auto"`` does at least (docs/quantization.md has the errors), and the share of its budget that
#: rounds of refinement may take.
_LEAST_ADMM_ITERATIONS = 5
_LEAST_ROUNDS = 2
_REFINED_SHARE = 0.25


@dataclass(frozen=True)
class Steps:
    """What is done to every path of a layer: the settings of the solvers.

    Attributes:
        method: the method, ``"auto"`` resolved.
        admm_iterations: 0 without ADMM.
        refine_rounds: 0 without refinement.
        itq_iterations: of Joint-ITQ, where there is a rotation.
        start: where ADMM starts; ``"joint-itq"`` takes an SVD and ends hardly lower.
        polar: how Joint-ITQ solves its orthogonal Procrustes step, see :func:`.polar_factor`.
    """

    method: Method
    admm_iterations: int
    refine_rounds: int
    itq_iterations: int
    start: Start = "random"
    polar: PolarMethod = "auto"

    @property
    def decomposes(self) -> bool:
        """Whether every path begins with an SVD."""
        return self.method != "admm" or self.start != "random"


def uses_one_path(method: Method) -> bool:
    """Whether one path of the whole rank is the better default: it is once signs are refined.

    The papers' initializations (LittleBit, LittleBit-2) use a primary and a residual path.
    """
    return method not in ("joint-itq", "dual-svid")


def resolve_steps(
    method: Method,
    shape: tuple[int, int],
    ranks: Sequence[int],
    *,
    admm_iterations: int,
    refine_rounds: int,
    itq_iterations: int,
    budget_seconds: float,
) -> Steps:
    """Return the steps of ``method`` for a layer.

    ``"auto"`` is ADMM with as many iterations as ``budget_seconds`` of counted work allow, after at most a
    quarter of it for rounds of refinement. At least 5 iterations and 2 rounds are done, whatever the budget:
    they end below Joint-ITQ, whose SVD and rotations are more work.

    Args:
        method: by name.
        shape: N and K.
        ranks: of every path.
        admm_iterations: asked for.
        refine_rounds: asked for.
        itq_iterations: asked for.
        budget_seconds: for the layer, at 50e9 operations a second; counts for ``"auto"`` only.
    """
    if method == "auto":
        method = "admm"
        budget = budget_seconds * NOMINAL_RATE
        round_work = sum(_round_operations(shape, rank) for rank in ranks)
        rounds = max(int(_REFINED_SHARE * budget / round_work), _LEAST_ROUNDS)
        refine_rounds = min(rounds, refine_rounds)
        work = sum(iteration_operations(shape, rank) for rank in ranks)
        iterations = max(int((budget - refine_rounds * round_work) / work), _LEAST_ADMM_ITERATIONS)
        admm_iterations = min(iterations, admm_iterations)
    return Steps(
        method=method,
        admm_iterations=admm_iterations if method == "admm" else 0,
        refine_rounds=refine_rounds if method in ("admm", "refine") else 0,
        itq_iterations=itq_iterations,
    )


def iteration_operations(shape: tuple[int, int], rank: int) -> float:
    """Count the operations of one iteration of ADMM on a path.

    Two projections of the target, two Gram matrices, their inverses, and two products with those.
    """
    n, k = shape
    return 4.0 * rank * n * k + 4.0 * rank**2 * (n + k) + 2.0 * rank**3


def _round_operations(shape: tuple[int, int], rank: int) -> float:
    """Two projections, two Gram matrices, two sweeps, four scales, and two systems for the latent scale."""
    n, k = shape
    return 4.0 * rank * n * k + 10.0 * rank**2 * (n + k) + 2 / 3 * rank**3
