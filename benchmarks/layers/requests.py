"""Options that `sweep` and `goals` share, and what they ask for."""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import add_json, note, positive
from benchmarks.shapes import LARGE_SHAPES, SHAPES, Shape, parse_shape

if TYPE_CHECKING:
    import torch

    from benchmarks.layers.rows import Document
    from benchmarks.layers.sweeping import Settings
    from benchmarks.timing import Timer

__all__ = ["add_measuring", "add_outputs", "parse_shapes", "report_unavailable", "settings", "write_outputs"]


def add_measuring(parser: argparse.ArgumentParser, *, repetitions: int) -> None:
    """Add the options of how to measure."""
    parser.add_argument("--repetitions", type=positive(int), default=repetitions, help="default %(default)s")
    parser.add_argument(
        "--seconds", type=positive(float), default=0.02, help="least duration of a turn (default %(default)s)"
    )
    parser.add_argument(
        "--cold-mib",
        type=positive(float),
        help="size of all copies of a cold layer (default: 8 times the last cache, 256 or more)",
    )
    parser.add_argument(
        "--memory-gib", type=positive(float), default=12, help="limit for all weights (default %(default)s)"
    )
    parser.add_argument("--no-floors", action="store_true", help="do not measure the machine's floors")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on the CPU, count the time of this process on any core, as where others use the machine too",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--csv``."""
    add_json(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE")


def parse_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes of names, ``K,N``, ``large`` and ``all``.

    Raises:
        ValueError: a name is unknown.
    """
    groups = {"large": list(LARGE_SHAPES), "all": list(SHAPES)}
    return [parse_shape(text) for name in names for text in groups.get(name, [name])]


def settings(options: Namespace, device: torch.device) -> Settings:
    """How to measure on ``device``."""
    from benchmarks.caches import default_cold_bytes
    from benchmarks.layers.sweeping import Settings
    from benchmarks.timing import CpuTimer, UnitTimer
    from benchmarks.timing_cuda import timer_for

    if options.cpu_time and device.type != "cpu":
        raise ValueError(f"--cpu-time is for the CPU, got device {device.type}")
    timer: Timer
    if getattr(options, "unit_times", False):
        timer = UnitTimer()
    elif options.cpu_time:
        timer = CpuTimer(time.process_time)
    else:
        timer = timer_for(device, graphs=not getattr(options, "no_graphs", False))
    cold = default_cold_bytes(device) if options.cold_mib is None else int(options.cold_mib * 2**20)
    return Settings(
        device=device,
        timer=timer,
        repetitions=options.repetitions,
        seconds=options.seconds,
        cold_bytes=cold,
        memory_bytes=int(options.memory_gib * 2**30),
        refcheck=getattr(options, "refcheck", False),
    )


def report_unavailable(document: Document) -> None:
    """Say on stderr what is not measured, and why."""
    for label, reason in document.unavailable.items():
        note(f"not measured: {label}: {reason}")


def write_outputs(options: Namespace, document: Document) -> None:
    """Write the files that the options ask for."""
    from benchmarks.layers.rows import write_csv, write_document

    if options.json is not None:
        print(f"\nwrote {write_document(options.json, options, document)}", file=sys.stderr)
    if options.csv is not None:
        print(f"wrote {write_csv(options.csv, document)}", file=sys.stderr)
