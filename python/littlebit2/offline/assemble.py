"""The last step of a run: finished layers and dense tensors become a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from littlebit2.checkpoint import CheckpointWriter, open_checkpoint
from littlebit2.disk import RunError, move_into_place, write_json

from .jobs import Job
from .report import RunReport
from .work import WorkDirectory, keep_layers

__all__ = ["REPORT_NAME", "assemble"]

#: The per-layer report inside the output; it holds nothing that differs from run to run.
REPORT_NAME = "quantization_report.json"


def assemble(
    source: Path,
    out: Path,
    work: WorkDirectory,
    jobs: list[Job],
    settings: dict[str, Any],
    *,
    overwrite: bool,
) -> RunReport:
    """Write the checkpoint from the finished layers, move it to ``out`` and remove the work directory.

    The checkpoint and its report are made inside the work directory, so that ``out`` appears at once and
    complete.

    Raises:
        RunError: the disk is full, or a layer file is missing or damaged.
        OSError: something cannot be written.
    """
    with keep_layers():
        report = _write(source, work, jobs, settings)
        move_into_place(work.assembled, out, overwrite=overwrite)
    work.remove()
    return report


def _write(source: Path, work: WorkDirectory, jobs: list[Job], settings: dict[str, Any]) -> RunReport:
    by_weight = {job.source.weight: job for job in jobs}
    biases = {job.source.bias for job in jobs}
    layers, seconds, dense = [], {}, []
    with open_checkpoint(source) as checkpoint:
        writer = CheckpointWriter(work.assembled, checkpoint.config)
        with writer:
            for name in checkpoint.dense:
                job = by_weight.get(name)
                if job is not None:
                    entry, seconds[job.source.name] = _finished(work, job)
                    layers.append(entry)
                    writer.add_layer(job.source.name, work.load_layer(job))
                elif name not in biases:
                    dense.append(name)
                    writer.add_tensor(name, checkpoint.load_tensor(name))
            writer.copy_extra_files(source)
            writer.finish()
    report = RunReport(settings, tuple(layers), tuple(dense), seconds)
    write_json(work.assembled / REPORT_NAME, report.as_dict())
    return report


def _finished(work: WorkDirectory, job: Job) -> tuple[dict[str, Any], float]:
    finished = work.finished(job)
    if finished is None:
        raise RunError(f"{work.layer_path(job)}: is missing or damaged; run the same command again")
    return finished
