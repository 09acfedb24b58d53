"""State what block-by-block quantization of a large model costs, from one block of its shape.

Makes a Llama of a few blocks with random weights, quantizes it with `littlebit2 quantize` on a little text,
and scales the measured parts of a block to the samples and steps of a real run: times of hidden states by
sequences, of tuning by steps. Prints hours for all blocks of the shape on this machine, and the peak memory,
which does not depend on the number of blocks. No GPU is measured.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from pathlib import Path

from benchmarks.options import note, positive
from benchmarks.shapes import LLAMA_SHAPES, parse_llama_shape

__all__ = ["add_arguments", "run", "scaled"]

#: Parts of the work whose time grows with the sequences.
_BY_SEQUENCE = ("targets", "outputs")
_LENGTH = 256
_HELD_OUT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--shape", default="llama2-7b", choices=list(LLAMA_SHAPES), help="default %(default)s"
    )
    parser.add_argument(
        "--bpw", type=positive(float), default=1.0, help="bits per weight (default %(default)g)"
    )
    parser.add_argument(
        "--blocks", type=positive(int), default=1, help="that are measured (default %(default)s)"
    )
    parser.add_argument(
        "--samples", type=positive(int), default=256, help="of the run to be stated (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive(int), default=200, help="of the run to be stated (default %(default)s)"
    )
    parser.add_argument(
        "--measured-samples", type=positive(int), default=8, help="sequences measured (default %(default)s)"
    )
    parser.add_argument(
        "--measured-steps", type=positive(int), default=4, help="steps measured (default %(default)s)"
    )
    parser.add_argument("--threads", type=positive(int), default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("build/block-cost"), help="default %(default)s")


def scaled(seconds: dict[str, float], blocks: int, options: Namespace) -> dict[str, float]:
    """Return the seconds of one block of the stated run, by part.

    Args:
        seconds: of all measured blocks, by part.
        blocks: how many.
        options: numbers of the measured and of the stated run.
    """
    sequences = (options.samples + _HELD_OUT) / (options.measured_samples + _HELD_OUT)
    factors = {**dict.fromkeys(_BY_SEQUENCE, sequences), "tuning": options.steps / options.measured_steps}
    return {part: value / blocks * factors.get(part, 1.0) for part, value in seconds.items()}


def run(options: Namespace) -> int:
    """Measure and print."""
    import json

    import torch

    from benchmarks.markdown import markdown
    from benchmarks.quality.random_llama import write_random_llama
    from benchmarks.quality.stages.commands import run_command
    from benchmarks.records import environment, write_result

    shape = parse_llama_shape(options.shape)
    options.out.mkdir(parents=True, exist_ok=True)
    dense, text = write_random_llama(options.out / "dense", shape, options.blocks)
    report = options.out / "report.json"
    out = options.out / "packed"
    arguments = [
        *("quantize", str(dense), str(out), "--bpw", str(options.bpw), "--data", str(text)),
        *("--length", str(_LENGTH), "--held-out", str(_HELD_OUT), "--threads", str(options.threads)),
        *("--samples", str(options.measured_samples), "--steps", str(options.measured_steps)),
        *("--overwrite", "--restart", "--no-trial", "--quiet", "--json"),
    ]
    _, peak = run_command(arguments, options.threads, output=report)
    seconds = json.loads(report.read_text("utf-8"))["blockwise"]["seconds"]
    parts = scaled(seconds, options.blocks, options)
    total = sum(parts.values())
    lines = [[part, f"{seconds[part] / options.blocks:.1f}", f"{value:.1f}"] for part, value in parts.items()]
    lines.append(["together", f"{sum(seconds.values()) / options.blocks:.1f}", f"{total:.1f}"])
    print(markdown(("part", "measured, s a block", "stated, s a block"), lines))
    hours = total * shape.layers / 3600
    print(
        f"\n{shape.name} at {options.bpw:g} bpw, {options.samples} sequences, {options.steps} steps: "
        f"{hours:.1f} hours for {shape.layers} blocks on {options.threads} threads, "
        f"peak memory {peak / 1e9:.1f} GB"
    )
    about = environment(torch.device("cpu"), [options.threads])
    path = write_result(
        options.out / "block-cost.json", options, about, seconds=seconds, scaled=parts, hours=hours, peak=peak
    )
    note(f"wrote {path}")
    return 0
