"""Ranks that depend on the weights: a first pass over the layers measures their spectra."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch

from littlebit2.quantize import (
    Importance,
    LayerSpectrum,
    QuantConfig,
    RankAllocation,
    settle_ranks,
    spectrum_of,
)

from .group import Group, share_out
from .jobs import Job
from .work import WorkDirectory, write_atomically

__all__ = ["allocation_of"]

#: The settled ranks inside the work directory, so that a run that goes on need not measure again.
_FILE = "ranks.json"


def allocation_of(
    group: Group,
    work: WorkDirectory,
    jobs: Sequence[Job],
    config: QuantConfig,
    importance: Mapping[str, Importance],
    load: Callable[[Job], torch.Tensor],
    run: Callable[[Sequence[tuple[Job, ...]], Callable[[Sequence[Job]], None]], None],
) -> dict[str, RankAllocation]:
    """Return the ranks of every layer, by name, in every process.

    Args:
        group: the processes, which share the measuring out.
        work: the open work directory.
        jobs: every layer.
        config: of the model.
        importance: by layer name.
        load: returns the weight of a layer.
        run: runs a function on this process's layers, in batches, as ``run_jobs`` does.

    Raises:
        TypeError, ValueError: a weight cannot be measured; the message names the layer.
        OSError, StreamError: the result cannot be written.
    """
    path = work.path / _FILE
    known = group.from_leader(lambda: path.read_text("utf-8") if path.exists() else None)
    if known is None:
        mine: dict[str, LayerSpectrum] = {}

        def measure(batch: Sequence[Job]) -> None:
            for job in batch:
                name = job.source.name
                mine[name] = spectrum_of(name, load(job), config, importance.get(name))

        def measure_share() -> dict[str, LayerSpectrum]:
            run([(job,) for job in share_out(jobs, group.size)[group.rank]], measure)
            return mine

        spectra = {name: found for part in group.collect(measure_share) for name, found in part.items()}
        settled = settle_ranks((spectra[job.source.name] for job in jobs), config)
        known = json.dumps([asdict(one) for one in settled.values()])
        group.from_leader(lambda: write_atomically(path, known.encode()))
    return {one["name"]: RankAllocation(**{**one, "ranks": tuple(one["ranks"])}) for one in json.loads(known)}
