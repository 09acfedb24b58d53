"""Ranks that depend on the weights: a first pass over the layers measures their spectra."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from littlebit2.architecture.select import DEFAULT_EXCLUDE, check_patterns
from littlebit2.checkpoint import open_dense
from littlebit2.disk import write_file
from littlebit2.quantize import Importance, QuantConfig
from littlebit2.quantize.allocate import LayerSpectrum, RankAllocation
from littlebit2.quantize.ranks import check_budget, needs_spectra, settle_ranks, spectrum_of

from .choice import choose_layers
from .group import Group, share_out
from .jobs import Job
from .work import WorkDirectory, keep_layers

__all__ = ["allocation_of", "measure_ranks"]

#: The settled ranks inside the work directory, so that a resumed run need not measure again.
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
        config: the model's configuration.
        importance: by layer name.
        load: returns the weight of a layer.
        run: runs a function on this process's layers, in batches, as ``run_jobs`` does.

    Raises:
        TypeError, ValueError: a weight cannot be measured; the message names the layer.
        OSError, RunError: the result cannot be written.
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

        def write() -> None:
            with keep_layers():
                write_file(path, known.encode())

        group.from_leader(write)
    return {one["name"]: RankAllocation(**{**one, "ranks": tuple(one["ranks"])}) for one in json.loads(known)}


def measure_ranks(
    model_dir: str | Path,
    config: QuantConfig,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    importance: Mapping[str, Importance] | None = None,
    progress: bool = True,
) -> dict[str, RankAllocation]:
    """Settle the ranks of a dense checkpoint's layers by the spectra of their weights, and quantize nothing.

    One weight at a time is in memory, with its smaller Gram matrix in float64.

    Args:
        model_dir: directory of the checkpoint.
        config: with ``budget="spectral"`` or ``energy``.
        include: as for :func:`.quantize_checkpoint`.
        exclude: likewise.
        importance: likewise.
        progress: whether to show a progress bar.

    Raises:
        FileNotFoundError: there is no ``model_dir``.
        ValueError: the checkpoint is malformed or not dense, no layer is selected, the budget does not fit a
            layer, or ``config`` needs no weights.
    """
    if not needs_spectra(config):
        raise ValueError("config must have budget='spectral' or energy for ranks to depend on weights")
    includes, excludes = check_patterns("include", include), check_patterns("exclude", exclude)
    spectra = []
    with open_dense(model_dir, name="model_dir") as checkpoint:
        sources = choose_layers(checkpoint, config, include=includes, exclude=excludes).layers
        check_budget(config, ((s.name, s.in_features, s.out_features) for s in sources))
        for one in tqdm(sources, desc="measure", unit="layer", disable=None if progress else True):
            weight = one.weight.read(checkpoint.load_tensor)
            spectra.append(spectrum_of(one.name, weight, config, (importance or {}).get(one.name)))
    return settle_ranks(spectra, config)
