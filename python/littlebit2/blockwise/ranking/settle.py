"""Ranks by the KL of the model's output: tried, allocated, and kept in the work folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from littlebit2.blockwise.tuning.block import BlockRunner
from littlebit2.blockwise.work import BlockwiseWork
from littlebit2.offline.jobs import Job

from .allocation import LayerGroup, allocate, fit, grouped, with_rank
from .kl import Trial, measure_kl

__all__ = ["RanksByKl", "ranks_by_kl"]


@dataclass(frozen=True)
class RanksByKl:
    """Ranks of the layers of all blocks.

    Attributes:
        entry: of the report. ``kl``: its sum over the groups, as expected with ``uniform`` ranks and with
            these (``allocated``). ``groups``: of each the ``block``, ``name``, number of ``layers``,
            ``uniform_rank`` and ``rank`` of each path, and what was ``measured``: pairs of rank and KL, null
            where it was not finite.
        seconds: that it took.
        ranks: of each path, by the name of the layer.
    """

    entry: dict[str, Any]
    seconds: float
    ranks: dict[str, int]

    def applied(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the layers with these ranks; those outside the blocks keep theirs."""
        return [
            with_rank(job, self.ranks[job.source.name]) if job.source.name in self.ranks else job
            for job in jobs
        ]


def ranks_by_kl(
    work: BlockwiseWork,
    runner: BlockRunner,
    blocks: Sequence[Sequence[Job]],
    *,
    progress: bool,
) -> RanksByKl:
    """Return ranks for the layers of all blocks, whose bits together are at most those of the uniform ranks.

    They are read from the work folder where an earlier call has found them.

    Args:
        work: the open work folder.
        runner: whose sequences, but the held-out ones, are for the trials.
        blocks: the layers of each, with uniform ranks.
        progress: whether to show a bar, where stderr is a terminal.

    Raises:
        ValueError: the output is not finite whatever is quantized.
    """
    groups = [
        group
        for index, jobs in enumerate(blocks)
        for group in grouped(jobs, index, runner.pieces.name(index))
    ]
    known = work.ranks()
    if known is None:
        start = time.perf_counter()
        with tqdm(
            total=len(blocks) + 1,
            desc="ranks",
            unit=" blocks",
            disable=None if progress else True,
            file=sys.stderr,
        ) as bar:
            entry = _measured(work, runner, groups, bar.update)
        known = {"entry": entry, "seconds": time.perf_counter() - start}
        work.keep_ranks(known)
    chosen = [group["rank"] for group in known["entry"]["groups"]]
    ranks = {job.source.name: rank for group, rank in zip(groups, chosen, strict=True) for job in group.jobs}
    return RanksByKl(known["entry"], known["seconds"], ranks)


def _measured(
    work: BlockwiseWork, runner: BlockRunner, groups: Sequence[LayerGroup], done: Callable[[], object]
) -> dict[str, Any]:
    trials = [Trial(group, rank) for group in groups for rank in group.trial_ranks(runner.settings.kl_sizes)]
    kls = iter(measure_kl(runner, trials, work.trials, done))
    measured = [{rank: next(kls) for rank in group.trial_ranks(runner.settings.kl_sizes)} for group in groups]
    curves = fit(groups, measured)
    ranks = allocate(groups, curves)
    expected = [
        curve.at(rank / group.uniform[0]) for group, curve, rank in zip(groups, curves, ranks, strict=True)
    ]
    return {
        "kl": {"uniform": math.fsum(curve.kl for curve in curves), "allocated": math.fsum(expected)},
        "groups": [
            {
                "block": group.block,
                "name": group.name,
                "layers": len(group.jobs),
                "uniform_rank": group.uniform[0],
                "rank": rank,
                "measured": [[at, kl if math.isfinite(kl) else None] for at, kl in found.items()],
            }
            for group, rank, found in zip(groups, ranks, measured, strict=True)
        ],
    }
