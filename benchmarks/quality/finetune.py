"""Measure what training adds to each initialization, on a model made on the spot.

Trains a small Llama from scratch on the source of the Python standard library, quantizes it at each of
--bpw by LittleBit's Dual-SVID, LittleBit-2's Joint-ITQ and ADMM (the best of the quantizer), trains each
against the dense model by the recipe of `littlebit2 finetune`, and measures perplexity on held-out files.
Every method has one path, so that all have the same ranks. Prints a markdown table; writes every entry of
the metrics and a plot to --out. Everything is seeded; each figure is that of one run.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from pathlib import Path

from benchmarks.options import positive

__all__ = ["METHODS", "add_arguments", "run"]

BPWS = (1.0, 0.55, 0.3)
#: Dual-SVID and Joint-ITQ are the papers' initializations, admm is this project's best.
METHODS = ("dual-svid", "joint-itq", "admm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--bpw", type=positive(float), nargs="+", default=list(BPWS), help="bits per weight")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--dense-steps",
        type=positive(int),
        default=600,
        help="dense model (default %(default)s)",
    )
    parser.add_argument("--dense", type=Path, help="dense model that an earlier run left here")
    parser.add_argument(
        "--steps", type=positive(int), default=100, help="each trained model (default %(default)s)"
    )
    parser.add_argument(
        "--lr",
        type=positive(float),
        default=3e-4,
        help="peak learning rate (default %(default)s)",
    )
    parser.add_argument("--threads", type=positive(int), default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/finetune"), help="default %(default)s")


def run(options: Namespace) -> int:
    """Train and measure."""
    from benchmarks.quality.training import train_and_measure

    train_and_measure(options)
    return 0
