"""Time candidates on every combination of shapes, bits per weight, tokens and dtypes.

Candidates take turns in rotating order, and ratios are formed within a repetition. "Cold" calls find
their weights in memory, "hot" ones in the caches. Prints a markdown table; --json and --csv keep
everything.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.layers.requests import (
    add_measuring,
    add_outputs,
    parse_shapes,
    report_unavailable,
    settings,
    write_outputs,
)
from benchmarks.options import cpu_threads, note, positive, usable_device
from benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    import torch

    from benchmarks.layers.candidates import Candidate
    from benchmarks.layers.rows import Row

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--candidates",
        nargs="+",
        default=["littlebit2:cpu:auto", "littlebit2:portable", "dense", "low-rank", "gemlite"],
        help="littlebit2:BACKEND:ACTIVATION, littlebit2:portable, dense, low-rank, unpack, gemlite",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["llama2-7b-up"],
        help=f"K,N, or one of {', '.join(SHAPES)}, large, all (default: llama2-7b-up)",
    )
    parser.add_argument("--bpw", nargs="+", type=positive(float), default=[0.1, 0.55, 1.0])
    parser.add_argument("--tokens", nargs="+", type=positive(int), default=[1, 8], metavar="M")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16, float16")
    parser.add_argument("--modes", nargs="+", choices=("hot", "cold"), default=["cold", "hot"])
    parser.add_argument("--threads", nargs="+", type=positive(int), default=[1], help="interleaved too")
    parser.add_argument("--paths", type=positive(int), default=2, help="P (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--no-graphs", action="store_true", help="launch calls one by one on a GPU")
    parser.add_argument(
        "--refcheck", action="store_true", help="compare with float64; exit 1 if an error passes its bound"
    )
    parser.add_argument(
        "--unit-times", action="store_true", help="dry run: call once, and pretend that it took 1 us"
    )
    add_measuring(parser, repetitions=11)
    add_outputs(parser)


def run(options: Namespace) -> int:
    """Measure; returns 1 if ``--refcheck`` finds an error past its bound."""
    from benchmarks.layers.floors import measure_floors
    from benchmarks.layers.rows import Document, floors_table, rows_table, write_document
    from benchmarks.layers.sweeping import Case, Entry, Sweep, available
    from benchmarks.problems import Problem, parse_dtype
    from benchmarks.records import describe_environment, environment

    device = usable_device(options.device)
    threads = cpu_threads(options.threads) if device.type == "cpu" else [0]
    shapes = parse_shapes(options.shapes)
    dtypes = [parse_dtype(text) for text in options.dtypes]
    candidates, unavailable = available(_candidates(options.candidates, dtypes, device), device)
    document = Document(environment(device, threads), unavailable=unavailable)
    report_unavailable(document)
    if not candidates:
        raise RuntimeError("candidates must hold one that can run, none of them can")
    how = settings(options, device)
    print(describe_environment(document.environment))
    if not options.no_floors:
        document.floors = measure_floors(threads, device=device, timer=how.timer, dtypes=dtypes)
        print(f"\n{floors_table(document.floors)}")
    sweep = Sweep(how, document.floors)
    entries = [Entry(candidate, count) for candidate in candidates for count in threads]
    cases = [Case(tokens, mode, entries) for tokens in options.tokens for mode in options.modes]
    for shape in shapes:
        for bpw in options.bpw:
            rows = list(sweep.measure(Problem(shape, bpw, options.paths, device), cases))
            print(f"\n{rows_table(rows)}", flush=True)
            document.rows += rows
            if options.json is not None:
                write_document(options.json, options, document)  # kept if the run is stopped
    write_outputs(options, document)
    return _refcheck_status(document.rows) if options.refcheck else 0


def _candidates(names: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Candidate]:
    """Every candidate in every dtype; on the CPU dense and low-rank in float32 as well."""
    import torch

    from benchmarks.layers.candidates import parse_candidate

    wanted = {}
    for name in dict.fromkeys(names):
        always = [torch.float32] if device.type == "cpu" and name in ("dense", "low-rank") else []
        for dtype in dict.fromkeys([*dtypes, *always]):
            candidate = parse_candidate(name, dtype)
            wanted[candidate.label] = candidate
    return list(wanted.values())


def _refcheck_status(rows: Sequence[Row]) -> int:
    status = 0
    for row in rows:
        if row.past_bound:
            note(
                f"error: {row.label} on {row.group}: relative error must be at most {row.error_bound:.1e}, "
                f"got {row.error:.1e}"
            )
            status = 1
    return status
