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
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types (default: all)")
    parser.add_argument(
        "--seconds",
        type=positive(int),
        default=60,
        help="limit of CPU time for each type (default %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("build/families.jsonl"),
        metavar="FILE",
        help="where each result is kept as it comes, one JSON object a line (default %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="keep what FILE holds, try what it lacks")
    parser.add_argument(
        "--retry",
        action="store_true",
        help="with --resume, try again what did not work or was not compared",
    )
    parser.add_argument("--every", type=positive(int), default=1, metavar="N", help="try each N-th type only")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write docs/models.md")
    add_json(parser)


def run(options: Namespace) -> int:
    """Try them; returns 1 if one failed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks.quality.families import FAILED, markdown, sweep
    from benchmarks.records import host_environment, write_result, write_text

    about = host_environment()
    git = about["git"] or {}
    commit = str(git.get("commit", "unknown"))[:12] + (" with local changes" if git.get("dirty") else "")
    outcomes = sweep(
        options.names,
        options.results,
        resume=options.resume,
        retry=options.retry,
        every=options.every,
        seconds=options.seconds,
        commit=commit,
    )
    counts = Counter(outcome.kind for outcome in outcomes)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if options.markdown is not None:
        write_text(options.markdown, markdown(outcomes, about["versions"]))
    if options.json is not None:
        write_result(options.json, options, about, outcomes=outcomes)
    return int(counts[FAILED] > 0)
