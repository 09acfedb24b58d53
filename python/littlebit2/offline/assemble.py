"""The last step of a run: finished layers and dense tensors become a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from littlebit2.checkpoint import CheckpointWriter, open_dense
from littlebit2.disk import RunError, move_into_place, sync, write_json

from .choice import Choice
from .jobs import Job
from .report import RunReport
from .work import WorkDirectory, keep_layers

__all__ = ["REPORT_NAME", "assemble", "weight_bytes"]

#: The per-layer report inside the output; it holds nothing that differs from run to run.
REPORT_NAME = "quantization_report.json"


def assemble(
    source: Path,
    out: Path,
    work: WorkDirectory,
    jobs: list[Job],
    choice: Choice,
    settings: dict[str, Any],
    *,
    overwrite: bool,
    changed: Mapping[str, torch.Tensor] | None = None,
    files: Mapping[str, Any] | None = None,
    copies: Mapping[str, Path] | None = None,
    keep_work: bool = False,
) -> RunReport:
    """Write the checkpoint from the finished layers, move it to ``out`` and remove the work directory.

    The checkpoint and its report are made inside the work directory, so that ``out`` appears at once and
    complete.

    Args:
        source: directory of the dense checkpoint.
        out: directory to make.
        work: holds the finished layers.
        jobs: all layers.
        choice: what is packed.
        settings: of the run.
        overwrite: whether ``out`` may be a checkpoint.
        changed: new values of tensors of the source that stay dense, by name.
        files: JSON values to write beside the weights, by file name.
        copies: files to copy beside the weights, by their path in ``out``.
        keep_work: whether the work directory stays.

    Raises:
        RunError: the disk is full, or a layer file is missing or damaged.
        OSError: something cannot be written.
    """
    with keep_layers():
        report = _write(source, work, jobs, choice, settings, changed or {})
        for name, value in (files or {}).items():
            write_json(work.assembled / name, value)
        for name, path in (copies or {}).items():
            copy = work.assembled / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            sync(copy)
        move_into_place(work.assembled, out, overwrite=overwrite)
    if not keep_work:
        work.remove()
    return report


def _write(
    source: Path,
    work: WorkDirectory,
    jobs: list[Job],
    choice: Choice,
    settings: dict[str, Any],
    changed: Mapping[str, torch.Tensor],
) -> RunReport:
    by_file: dict[str, list[Job]] = {}
    for job in jobs:
        by_file.setdefault(job.source.weight.files[0], []).append(job)
    layers, seconds, dense = [], {}, []
    with open_dense(source) as checkpoint:
        writer = CheckpointWriter(work.assembled, {**checkpoint.config, **choice.changes}, int8=choice.int8)
        with writer:
            for name in checkpoint.dense:
                for job in by_file.get(name, ()):
                    entry, seconds[job.source.name] = _finished(work, job)
                    layers.append(entry)
                    writer.add_layer(job.source.name, work.load_layer(job))
                if name not in choice.replaced:
                    dense.append(name)
                    value = changed.get(name)
                    writer.add_tensor(name, checkpoint.load_tensor(name) if value is None else value)
            for name, part in choice.extra.items():
                dense.append(name)
                writer.add_tensor(name, part.read(checkpoint.load_tensor).contiguous())
            side = writer.copy_side_files(source)
            writer.finish()
    reasons: dict[str, list[str]] = {}
    for module, reason in choice.dense.items():
        reasons.setdefault(reason, []).append(module)
    sizes = {"before": weight_bytes(source), "after": weight_bytes(work.assembled)}
    report = RunReport(
        settings,
        tuple(layers),
        tuple(dense),
        seconds,
        dict(side.left),
        reasons=reasons,
        notes=choice.notes,
        bytes=sizes,
    )
    write_json(work.assembled / REPORT_NAME, report.as_dict())
    return report


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the weight files in a checkpoint directory."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def _finished(work: WorkDirectory, job: Job) -> tuple[dict[str, Any], float]:
    finished = work.finished(job)
    if finished is None:
        raise RunError(f"{work.layer_path(job)}: is missing or damaged; run the same command again")
    return finished
