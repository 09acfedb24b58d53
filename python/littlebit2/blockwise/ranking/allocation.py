"""Ranks of the layers of blocks, from what the model's output loses when they are quantized.

The KL of a group of layers is taken to fall exponentially with its rank, which was fitted to a few trials: so
it is monotone and convex, whatever their noise, and sums of it are minimized greedily.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from littlebit2.offline.jobs import Job
from littlebit2.quantize.allocate import rank_options, spend
from littlebit2.quantize.budget import largest_rank
from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape

__all__ = ["BOUNDS", "Curve", "LayerGroup", "allocate", "fit", "grouped", "with_rank"]

#: Least and greatest rank relative to the uniform one, see :func:`.rank_options`.
BOUNDS = (0.5, 2.0)
#: KL below which differences are rounding errors.
_LEAST_KL = 1e-7
#: Share of a group's own decay in the one that is taken; the rest is the median of all: few trials are noisy.
_OWN = 0.5
#: Decay where no group was tried at two ranks; in a Llama of 135 M weights at 1 bpw the median is about 1.1.
_DECAY = 1.0


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one block and of one shape whose ranks are chosen together, such as a mixture's experts.

    Attributes:
        block: index of it.
        name: of the layers, with ``*`` for the numbers in which they differ.
        jobs: the layers, with their uniform ranks.
    """

    block: int
    name: str
    jobs: tuple[Job, ...]

    @property
    def features(self) -> tuple[int, int]:
        """K and N of each layer."""
        source = self.jobs[0].source
        return source.in_features, source.out_features

    @property
    def uniform(self) -> tuple[int, ...]:
        """Ranks of the paths of each layer."""
        ranks = self.jobs[0].config.ranks
        assert ranks is not None  # settled by make_jobs
        return ranks

    @property
    def options(self) -> range:
        """Ranks that each path may get."""
        return rank_options(*self.features, self.uniform[0], BOUNDS)

    def bits(self, rank: int) -> int:
        """Return the counted bits of all layers at a rank of every path."""
        return len(self.jobs) * LayerShape(*self.features, (rank,) * len(self.uniform)).counted_bits

    def trial_ranks(self, sizes: Sequence[float]) -> list[int]:
        """Return the ranks, ascending, that are nearest to ``sizes`` times the uniform one."""
        most = largest_rank(*self.features)
        wanted = (RANK_MULTIPLE * round(size * self.uniform[0] / RANK_MULTIPLE) for size in sizes)
        return sorted({min(max(rank, RANK_MULTIPLE), most) for rank in wanted})


@dataclass(frozen=True)
class Curve:
    """The KL of a group by its rank ``r``: ``kl * exp(-decay * (r / uniform rank - 1))``.

    Attributes:
        kl: at the uniform rank.
        decay: not negative.
    """

    kl: float
    decay: float

    def at(self, size: float) -> float:
        """Return the KL at ``size`` times the uniform rank."""
        return self.kl * math.exp(-self.decay * (size - 1))


def with_rank(job: Job, rank: int) -> Job:
    """Return a layer with another rank of each path."""
    return replace(job, config=replace(job.config, ranks=(rank,) * len(job.config.ranks or ())))


def grouped(jobs: Sequence[Job], block: int, name: str) -> list[LayerGroup]:
    """Return the groups of a block's layers, in the order of the first of each.

    Args:
        jobs: the layers.
        block: index of the block.
        name: of the block in the model.
    """
    found: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        inside = job.source.module.removeprefix(f"{name}.")
        pattern = ".".join("*" if part.isdigit() else part for part in inside.split("."))
        group = LayerGroup(block, f"{name}.{pattern}", (job,))
        found.setdefault((group.name, group.features, group.uniform), []).append(job)
    return [LayerGroup(block, str(key[0]), tuple(members)) for key, members in found.items()]


def fit(groups: Sequence[LayerGroup], measured: Sequence[Mapping[int, float]]) -> list[Curve]:
    """Fit the curves of all groups to their trials.

    A KL that is not finite is left out. A group without any other is taken to be as bad as the worst one.

    Args:
        groups: of layers.
        measured: for each group the KL by rank.

    Raises:
        ValueError: no KL is finite.
    """
    points = [
        [
            (rank / group.uniform[0], math.log(max(kl, _LEAST_KL)))
            for rank, kl in sorted(found.items())
            if math.isfinite(kl)
        ]
        for group, found in zip(groups, measured, strict=True)
    ]
    if not any(points):
        raise ValueError(
            "budget='kl' needs a model whose output stays finite, got NaN or infinity whatever is quantized: "
            "use budget='uniform'"
        )
    own = [_decay(some) for some in points]
    known = [decay for decay in own if decay is not None]
    common = median(known) if known else _DECAY
    decays = [common if decay is None else _OWN * decay + (1 - _OWN) * common for decay in own]
    levels = [
        math.exp(fmean(y for _, y in some) + decay * (fmean(x for x, _ in some) - 1)) if some else None
        for some, decay in zip(points, decays, strict=True)
    ]
    worst = max(level for level in levels if level is not None)
    return [
        Curve(worst if level is None else level, decay) for level, decay in zip(levels, decays, strict=True)
    ]


def _decay(points: Sequence[tuple[float, float]]) -> float | None:
    """Return how fast ``y`` falls with ``x`` by least squares, at least 0; ``None`` of fewer than two."""
    if len(points) < 2:
        return None
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return max(-covariance / sum((x - x_mean) ** 2 for x, _ in points), 0.0)


def allocate(groups: Sequence[LayerGroup], curves: Sequence[Curve]) -> list[int]:
    """Return the rank of each group's paths: those of the least sum of KLs at the bits of the uniform ranks.

    Args:
        groups: of layers.
        curves: the KL of each.
    """
    losses = [
        [curve.at(rank / group.uniform[0]) for rank in group.options]
        for group, curve in zip(groups, curves, strict=True)
    ]
    costs = [group.bits(2 * RANK_MULTIPLE) - group.bits(RANK_MULTIPLE) for group in groups]
    budget = sum(group.bits(group.uniform[0]) - group.bits(group.options[0]) for group in groups)
    taken = spend(losses, costs, budget)
    return [group.options[count] for group, count in zip(groups, taken, strict=True)]
