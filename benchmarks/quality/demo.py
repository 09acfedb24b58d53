"""Quantize a small real model, compare it with the dense one, and time one large layer (`make demo`).

The model is all-MiniLM-L6-v2 (sentence embeddings), whose weights ship in a Python package.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from benchmarks.options import positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--bpw", type=positive(float), default=1.0, help="counted bits per weight (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder (default %(default)s)")


def run(options: Namespace) -> int:
    """Run the demo."""
    from benchmarks.quality.demonstration import demonstrate

    demonstrate(options.bpw, options.out)
    return 0
