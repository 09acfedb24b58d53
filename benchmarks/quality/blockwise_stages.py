"""The stages of `blockwise`: commands, their time and memory, and the perplexity of what they write."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.markdown import markdown
from benchmarks.options import note
from benchmarks.quality.smollm import dense_checkpoint, write_texts
from benchmarks.records import environment, write_result

__all__ = ["Stage", "command", "measure"]

_LENGTH = 256


@dataclass(frozen=True)
class Stage:
    """One measured command.

    Attributes:
        stage: of :data:`.STAGES`, or ``"dense"``.
        bpw: bits per weight asked for; 16 for the dense model.
        seed: of quantization and tuning.
        perplexity: on the evaluation text.
        minutes: of the command, by the clock.
        peak: resident memory of the command, bytes.
    """

    stage: str
    bpw: float
    seed: int
    perplexity: float
    minutes: float
    peak: int


def command(
    stage: str, dense: Path, data: Path, out: Path, bpw: float, seed: int, options: Namespace
) -> list[str]:
    """Return the arguments of ``littlebit2`` for a stage."""
    if stage == "finetune":
        return [
            *("finetune", str(dense), str(out), "--data", str(data), "--bpw", str(bpw), "--overwrite"),
            *("--quant-seed", str(seed), "--steps", str(options.finetune_steps), "--batch-size", "4"),
            *(
                "--block",
                str(_LENGTH),
                "--lr",
                "3e-4",
                "--admm-iterations",
                "300",
                "--no-tensorboard",
                "--quiet",
            ),
        ]
    quantize = [
        *("quantize", str(dense), str(out), "--bpw", str(bpw), "--seed", str(seed), "--overwrite"),
        *("--restart", "--no-trial", "--quiet"),
    ]
    if stage == "layers":
        return [*quantize, "--method", "admm", "--workers", str(options.threads)]
    steps = 0 if stage == "untuned" else options.steps
    distill = options.distill_steps if stage == "distilled" else 0
    return [
        *quantize,
        *("--data", str(data), "--length", str(_LENGTH), "--samples", str(options.samples)),
        *("--steps", str(steps), "--distill-steps", str(distill), "--threads", str(options.threads)),
    ]


def measure(options: Namespace) -> None:
    """Run all stages: the table goes to stdout, JSON to ``options.out``."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    dense = dense_checkpoint(options.out)
    hashes = write_texts(options.out / "text")
    note(f"text: {', '.join(f'{name} sha256 {digest}' for name, digest in hashes.items())}")
    evaluation = options.out / "text" / "evaluate"
    found = [Stage("dense", 16.0, 0, _perplexity(dense, evaluation, options), 0.0, 0)]
    for bpw in options.bpw:
        for seed in options.seeds:
            for stage in options.stages:
                out = options.out / f"{stage}-{bpw:g}-{seed}"
                shutil.rmtree(out.with_name(f"{out.name}.finetune"), ignore_errors=True)
                arguments = command(stage, dense, options.out / "text" / "tune", out, bpw, seed, options)
                note(f"littlebit2 {' '.join(arguments)}")
                minutes, peak = _run(arguments, options.threads)
                value = _perplexity(out, evaluation, options)
                found.append(Stage(stage, bpw, seed, value, minutes, peak))
                note(f"{stage}: perplexity {value:.4g}, {minutes:.1f} minutes")
    about = environment(torch.device("cpu"), [options.threads])
    print(_table(found))
    path = write_result(options.out / "blockwise.json", options, about, texts=hashes, stages=found)
    note(f"wrote {path}")


def _table(stages: Sequence[Stage]) -> str:
    dense = stages[0].perplexity
    lines = [
        [
            f"{one.bpw:g}",
            str(one.seed),
            one.stage,
            f"{one.perplexity:.4g}",
            f"{one.perplexity / dense:.3g}",
            f"{one.minutes:.1f}",
            f"{one.peak / 1e9:.2f}",
        ]
        for one in stages
    ]
    return markdown(("bpw", "seed", "stage", "perplexity", "times dense", "minutes", "peak GB"), lines)


def _run(arguments: Sequence[str], threads: int) -> tuple[float, int]:
    """Run ``littlebit2``; return minutes and peak resident bytes."""
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, "-m", "littlebit2", *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, ["littlebit2", *arguments])
    return (time.perf_counter() - began) / 60, _bytes(usage)


def _bytes(usage: resource.struct_rusage) -> int:
    """Peak resident memory; Linux counts in KiB."""
    return usage.ru_maxrss * 1024


def _perplexity(checkpoint: Path, data: Path, options: Namespace) -> float:
    from littlebit2.train.recipe import evaluate_model

    found = evaluate_model(checkpoint, data, block=_LENGTH, max_tokens=options.tokens).perplexity
    assert found is not None  # there is text
    return found.value
