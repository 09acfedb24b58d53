"""Try every model family of transformers at a tiny size: quantize, save, load, compare with the dense model.

Prints one line per model class: works, refused, not built (the family was not tried), or FAILED. Exit 1
if one failed.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections import Counter
from pathlib import Path

from benchmarks.options import add_json, positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="model classes or types (default: all)")
    parser.add_argument(
        "--seconds", type=positive(int), default=60, help="limit for each class (default %(default)s)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table of docs/models.md")
    add_json(parser)


def run(options: Namespace) -> int:
    """Try them; returns 1 if one failed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.quality.families import FAILED, markdown, sweep
    from benchmarks.records import host_environment, write_result

    outcomes = sweep(options.names, seconds=options.seconds)
    counts = Counter(outcome.kind for outcome in outcomes)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if options.markdown is not None:
        options.markdown.write_text(markdown(outcomes), "utf-8")
    if options.json is not None:
        write_result(options.json, options, host_environment(), outcomes=outcomes)
    return int(counts[FAILED] > 0)
