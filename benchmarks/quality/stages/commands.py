"""The commands of `blockwise`, and how they are run and timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks.options import note

__all__ = ["calibrate_command", "finetune_command", "quantize_command", "run_command", "seconds_per_step"]

_LENGTH = 256
#: Steps of two short trainings, whose times tell that of a step.
_FEW, _MORE = 2, 8


def calibrate_command(dense: Path, data: Path, out: Path, options: Namespace) -> list[str]:
    """Return the arguments of ``littlebit2`` that measure the importance of all layers' inputs."""
    tokens = str(options.samples * _LENGTH)
    return [
        *("calibrate", str(dense), "--data", str(data), "--out", str(out), "--overwrite", "--quiet"),
        *("--tokens", tokens, "--block", str(_LENGTH)),
    ]


def quantize_command(
    stage: str,
    dense: Path,
    data: Path,
    out: Path,
    bpw: float,
    seed: int,
    importance: Path,
    options: Namespace,
) -> list[str]:
    """Return the arguments of ``littlebit2`` for a stage that quantizes."""
    quantize = [
        *("quantize", str(dense), str(out), "--bpw", str(bpw), "--seed", str(seed), "--overwrite"),
        *("--no-trial", "--quiet"),
    ]
    if stage in ("layers", "importance"):
        weighted = ["--importance", str(importance)] if stage == "importance" else []
        return [*quantize, "--method", "admm", "--workers", str(options.threads), *weighted]
    budget = ["--budget", "kl"] if stage == "ranks" else []
    distill = ["--distill-minutes", str(options.distill_minutes)] if stage == "distilled" else []
    return [
        *quantize,
        *("--data", str(data), "--length", str(_LENGTH), "--samples", str(options.samples)),
        *("--steps", str(0 if stage == "untuned" else options.steps), "--threads", str(options.threads)),
        *budget,
        *distill,
        *(["--keep-work"] if stage in ("tuned", "distilled") else []),
    ]


def finetune_command(dense: Path, data: Path, out: Path, bpw: float, seed: int, steps: int) -> list[str]:
    """Return the arguments of ``littlebit2`` that train for some steps, from ADMM's layers."""
    return [
        *("finetune", str(dense), str(out), "--data", str(data), "--bpw", str(bpw), "--overwrite"),
        *("--quant-seed", str(seed), "--steps", str(steps), "--batch-size", "4", "--block", str(_LENGTH)),
        *("--lr", "3e-4", "--precision", "bfloat16", "--admm-iterations", "300"),
        *("--no-tensorboard", "--quiet"),
    ]


def run_command(arguments: Sequence[str], threads: int, output: Path | None = None) -> tuple[float, int]:
    """Run ``littlebit2``; return seconds by the clock and peak resident bytes.

    Args:
        arguments: of the command.
        threads: of OpenMP.
        output: takes what the command prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    note(f"littlebit2 {' '.join(arguments)}")
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "littlebit2", *arguments]
    with nullcontext() if output is None else output.open("wb") as stdout:
        process = subprocess.Popen(command, env=environment, stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - began, usage.ru_maxrss * 1024  # Linux counts in KiB


def seconds_per_step(command: Callable[[int], list[str]], threads: int) -> tuple[float, float]:
    """Return the seconds of a step and of everything else, from two short runs.

    Args:
        command: returns the arguments for a number of steps.
        threads: of each run.
    """
    few, _ = run_command(command(_FEW), threads)
    more, _ = run_command(command(_MORE), threads)
    each = max(more - few, 1e-3) / (_MORE - _FEW)
    return each, max(few - _FEW * each, 0.0)
