"""Quantize a real language model, compare it with the dense one, and draw both (`make demo`).

The model is SmolLM2-135M-Instruct, which a Python package carries; the text is the documentation of installed
packages. Nothing else is downloaded.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from pathlib import Path

from benchmarks.options import positive

__all__ = ["add_arguments", "run"]

#: Bits per weight that every layer of the model can use and pay for.
_LEAST, _MOST = 0.2, 2.0


def _bpw(text: str) -> float:
    value = positive(float)(text)
    if not _LEAST <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"bits per weight must be from {_LEAST} to {_MOST}, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--bpw", type=_bpw, default=1.0, help="counted bits per weight (default %(default)s)")
    parser.add_argument(
        "--minutes",
        type=positive(float),
        default=3.0,
        help="of quantizing; more give a better model (default %(default)g)",
    )
    parser.add_argument("--threads", type=positive(int), default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder (default %(default)s)")


def run(options: Namespace) -> int:
    """Run the demo."""
    from benchmarks.quality.demonstration.show import demonstrate

    demonstrate(options.bpw, options.minutes, options.threads, options.out)
    return 0
