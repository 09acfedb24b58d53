"""Quantize a checkpoint on disk to a checkpoint on disk, layer by layer."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from littlebit2.architecture.parts import Whole
from littlebit2.architecture.select import DEFAULT_EXCLUDE, KEEP, check_patterns
from littlebit2.checkpoint import DenseCheckpoint, find_side_files, open_checkpoint, open_dense
from littlebit2.disk import check_apart, check_replaceable, check_space
from littlebit2.quantize import Importance, QuantConfig
from littlebit2.quantize.device import check_device
from littlebit2.quantize.quantizer import DenseLayer, quantize_together
from littlebit2.quantize.ranks import needs_spectra

from .assemble import REPORT_NAME, assemble, weight_bytes
from .choice import Choice, choose_layers
from .group import Group, process_group, share_out
from .jobs import Job, make_jobs, run_settings, with_allocation
from .ranks import allocation_of
from .report import RunReport, layer_entry
from .work import WorkDirectory, work_path
from .workers import choose_workers, make_batches, run_jobs

__all__ = [
    "REPORT_NAME",
    "dense_bytes_of",
    "quantize_batch",
    "quantize_checkpoint",
    "start_run",
]


def quantize_checkpoint(
    model_dir: str | Path,
    out: str | Path,
    config: QuantConfig,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    head: str = KEEP,
    embedding: str = KEEP,
    importance: Mapping[str, Importance] | None = None,
    workers: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> RunReport:
    """Quantize the linear layers of a dense checkpoint and write a littlebit2 checkpoint.

    Weights are read tensor by tensor; one layer per worker, or a few small ones of one shape, is in memory.
    Every finished layer is kept in the work directory ``<out>.partial``: after a kill at any moment the same
    call continues from there, and the bytes of ``out`` are the same. ``out`` appears at the end, whole, with
    ``quantization_report.json`` in it, and the work directory is removed. A further call returns the report.

    Where ranks depend on the weights (``budget="spectral"`` or ``energy``), a first pass measures the
    spectra.

    The bytes depend on the source, on ``config``, ``include``, ``exclude``, ``importance``, ``threads`` and
    ``device``, on the kind of machine and the versions of torch and of this package; not on ``workers``, on
    the number of processes, on the order of the work or on which small layers are worked on together. Each
    layer's seed comes from ``config.seed`` and its name, as in :func:`littlebit2.quantize_`.

    Started by ``torchrun``, the processes share the layers out and rank 0 assembles; ``out`` must be on a
    file system that all of them see.

    Args:
        model_dir: directory of a dense checkpoint: safetensors and ``config.json``.
        out: directory to make.
        config: size, method, seed. ``kv_factor`` applies to names ending in ``k_proj`` or ``v_proj``.
        include: shell-style pattern or patterns on module names; which tensors are linear weights
            is said in :mod:`littlebit2.architecture.tensors`.
        exclude: likewise; wins. Heads by default.
        head: ``"keep"``, or ``"int8"``: a dense head is written as int8 rows with a float32 scale each.
        embedding: likewise, the embedding of tokens. Either rounds both if the head is tied to it.
        importance: by module name (:func:`.collect_importance`); layers that are not in it weigh all errors
            alike.
        workers: layers at a time (in each process); ``None`` chooses by cores and free memory.
        threads: torch's threads for one layer.
        device: where to compute; ``"cuda"`` is each process's own device under ``torchrun``.
        progress: whether to show a progress bar with the time left, on stderr.
        resume: continue an interrupted run; otherwise its layers are discarded.
        overwrite: whether ``out`` may exist; it is replaced at the end.

    Returns:
        What was done, layer by layer (in every process).

    Raises:
        FileExistsError: ``out`` exists, is no empty directory and no finished run of these settings, and
            either ``overwrite`` is off or it is something else than a checkpoint.
        FileNotFoundError: there is no ``model_dir``.
        OSError: a file cannot be read or written.
        RunError: the disk is full or too small, the work directory belongs to a run with other settings
            or is in use, is a folder of somebody else, or another process failed.
        TypeError: ``config`` is no :class:`.QuantConfig`, or a pattern no string.
        ValueError: ``out`` or ``<out>.partial`` and ``model_dir`` contain one another, ``workers``,
            ``threads`` or ``device`` cannot be, the checkpoint is malformed or not dense, no layer is
            selected, ``importance`` holds none of them, the budget does not fit a layer or is more than any
            can use, or a layer cannot be quantized; the message names it.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a positive integer, got {threads!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers must be a positive integer or None, got {workers!r}")
    place = _device(device)
    source, target = Path(model_dir), Path(os.path.abspath(out))
    check_apart(target, work_path(target), model_dir=source)
    includes, excludes = check_patterns("include", include), check_patterns("exclude", exclude)
    with open_dense(source, name="model_dir") as checkpoint:
        choice = choose_layers(
            checkpoint, config, include=includes, exclude=excludes, head=head, embedding=embedding
        )
        jobs = make_jobs(choice.layers, config)
        _check_importance(importance, jobs)
        dense_bytes = dense_bytes_of(checkpoint.dense, choice)
    with process_group() as group, open_dense(source) as reading:
        settings = group.from_leader(
            lambda: run_settings(
                reading,
                config,
                includes,
                excludes,
                importance,
                head=head,
                embedding=embedding,
                device=device,
                threads=threads,
            )
        )
        work = WorkDirectory(target, settings)
        run = partial(_run_all, group, workers=workers, threads=threads, show=progress)
        weights = importance or {}
        try:
            before = group.from_leader(partial(start_run, work, source, target, resume, overwrite))
            if before is not None:
                return before
            if needs_spectra(config):
                allocation = allocation_of(
                    group,
                    work,
                    jobs,
                    config,
                    weights,
                    partial(_load, reading, place),
                    partial(run, "measure"),
                )
                jobs = with_allocation(jobs, config, allocation)
            pending = group.from_leader(lambda: [job.index for job in jobs if work.finished(job) is None])
            group.together(partial(_check_space, work, [jobs[i] for i in pending], jobs, dense_bytes))
            mine = share_out([jobs[i] for i in pending], group.size)[group.rank]
            batches = make_batches(mine, workers, threads, device)
            do = partial(quantize_batch, reading, work, weights, place)
            group.together(partial(run, "quantize", batches, do))
            return group.from_leader(
                partial(assemble, source, target, work, jobs, choice, settings, overwrite=overwrite)
            )
        finally:
            work.close()


def _check_importance(importance: Mapping[str, Importance] | None, jobs: Sequence[Job]) -> None:
    if importance is None:
        return
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance must be a mapping by module name, got {type(importance).__name__}")
    if not any(job.source.name in importance for job in jobs):
        raise ValueError(
            f"importance must hold at least one selected layer, such as {jobs[0].source.name!r}, got "
            f"{sorted(importance)[:3]}"
        )


def start_run(
    work: WorkDirectory, source: Path, target: Path, resume: bool, overwrite: bool
) -> RunReport | None:
    """Take the work directory, unless there is nothing left to do: then return the report."""
    if os.path.lexists(target):
        report = finished_report(target, work.wanted) if resume else None
        if report is not None:
            work.remove_remainder(work.of_layers)
            return report
        try:
            check_replaceable(target, overwrite=overwrite, replaces=find_side_files(source).copied)
        except FileExistsError as error:
            raise FileExistsError(
                f"{error}; what is there is not the finished result of this command with these settings, "
                "which would be kept: name another directory for the output, or overwrite it"
            ) from None
    work.open(resume=resume)
    return None


def finished_report(out: Path, settings: Mapping[str, Any]) -> RunReport | None:
    """Return the report of a finished run of these settings in ``out``, or ``None``.

    So it is where the report is there and its files are not, or not whole.
    """
    try:
        content = json.loads((out / REPORT_NAME).read_text("utf-8"))
        if content["settings"] == settings and _is_whole(out, content):
            return RunReport(
                dict(settings),
                tuple(content["layers"]),
                tuple(content["dense"]),
                left=content.get("left", {}),
                reasons=content.get("reasons", {}),
                notes=tuple(content.get("notes", ())),
                bytes=content.get("bytes", {}),
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _is_whole(out: Path, content: Mapping[str, Any]) -> bool:
    """Whether the headers and sizes of the files in ``out`` are those of its report."""
    if not (out / "config.json").is_file():
        return False
    with open_checkpoint(out) as made:
        names = {layer["name"] for layer in content["layers"]}
        return set(made.layers) == names and weight_bytes(out) == content["bytes"]["after"]


def _device(device: str) -> torch.device:
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return check_device(device)


def dense_bytes_of(tensors: Any, choice: Choice) -> int:
    """Return the bytes of the tensors that stay as they are."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize
        for name, (shape, dtype) in tensors.items()
        if name not in choice.replaced
    )


def _check_space(work: WorkDirectory, pending: Sequence[Job], jobs: Sequence[Job], dense_bytes: int) -> None:
    """Do not begin hours of work that cannot be written down: every layer is there twice at the end."""
    needed = sum(j.stored_bytes for j in pending) + sum(j.stored_bytes for j in jobs) + dense_bytes
    check_space(work.path, needed)


def _run_all(
    group: Group,
    label: str,
    mine: Sequence[tuple[Job, ...]],
    do: Callable[[Sequence[Job]], None],
    *,
    workers: int | None,
    threads: int,
    show: bool,
) -> None:
    """Do something to every layer of this process, under a progress bar."""
    size = choose_workers(mine, workers, threads)
    jobs = [job for batch in mine for job in batch]
    with tqdm(
        total=sum(job.weights for job in jobs),
        desc=label if group.size == 1 else f"{label}, rank {group.rank} of {group.size}",
        unit=" weights",
        unit_scale=True,
        disable=None if show and group.leads else True,
        file=sys.stderr,
        smoothing=0.1,
    ) as bar:
        count = 0

        def done(batch: Sequence[Job]) -> None:
            nonlocal count
            count += len(batch)
            bar.set_postfix_str(f"layer {count}/{len(jobs)}", refresh=False)
            bar.update(sum(job.weights for job in batch))

        run_jobs(mine, do, done, workers=size, threads=threads)


def _load(checkpoint: DenseCheckpoint, device: torch.device, job: Job) -> torch.Tensor:
    # In memory of its own, which the quantizer may overwrite: a mapping would count beside its working copy.
    part = job.source.weight
    if isinstance(part, Whole):
        return checkpoint.read_tensor(part.name).to(device)
    return part.read(checkpoint.load_tensor).to(device, copy=True).contiguous()


def quantize_batch(
    checkpoint: DenseCheckpoint,
    work: WorkDirectory,
    importance: Mapping[str, Importance],
    device: torch.device,
    batch: Sequence[Job],
) -> None:
    """Quantize layers of one shape, and write them to the work directory."""
    start = time.perf_counter()
    layers = [
        DenseLayer(
            partial(_load, checkpoint, device, job),
            job.config,
            _bias(checkpoint, device, job),
            importance.get(job.source.name),
            name=job.source.name,
        )
        for job in batch
    ]
    quantized = quantize_together(layers)
    seconds = (time.perf_counter() - start) / len(batch)
    for job, layer, one in zip(batch, layers, quantized, strict=True):
        report = replace(one.report, predicted_error=job.predicted_error)
        work.write_layer(job, one.packed, layer_entry(report, bias=layer.bias is not None), seconds)


def _bias(checkpoint: DenseCheckpoint, device: torch.device, job: Job) -> torch.Tensor | None:
    if job.source.bias is None:
        return None
    return job.source.bias.read(checkpoint.load_tensor).to(device, copy=True)
