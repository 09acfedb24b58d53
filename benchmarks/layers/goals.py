"""Compare the CPU kernels with their goals: speed over float32 peers, error against float64.

Goals are geometric means over the four large Llama-2 shapes, one thread. --from prints the tables of an
earlier run.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import PROCESSORS
from benchmarks.layers.requests import (
    add_measuring,
    add_outputs,
    parse_shapes,
    report_unavailable,
    settings,
    write_outputs,
)
from benchmarks.options import note, positive
from benchmarks.shapes import GOAL_BPWS, LARGE_SHAPES

if TYPE_CHECKING:
    from benchmarks.layers.rows import Document

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--shapes", nargs="+", default=list(LARGE_SHAPES))
    parser.add_argument("--bpw", nargs="+", type=positive(float), default=list(GOAL_BPWS))
    parser.add_argument("--exact", default="littlebit2:cpu:exact", help="candidate of the exact goals")
    parser.add_argument("--int16", default="littlebit2:cpu:int16", help="candidate of the int16 goals")
    parser.add_argument("--quick", action="store_true", help="3 repetitions")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing, read this JSON"
    )
    add_measuring(parser, repetitions=9)
    add_outputs(parser)


def run(options: Namespace) -> int:
    """Print every goal beside what was measured, now or in the run of ``--from``."""
    from benchmarks.layers.goal_results import by_bpw_table, evaluate, goals_table
    from benchmarks.layers.goal_runs import METHOD_DTYPES
    from benchmarks.layers.rows import floors_table, load_document
    from benchmarks.problems import dtype_name
    from benchmarks.records import describe_environment

    names = {"exact": options.exact, "int16": options.int16}
    labels = {method: f"{name} {dtype_name(METHOD_DTYPES[method])}" for method, name in names.items()}
    document = load_document(options.source) if options.source else _measure(options, names)
    reasons = {
        method: document.unavailable[label]
        for method, label in labels.items()
        if label in document.unavailable
    }
    results = evaluate(document.rows, document.checks, labels, reasons=reasons)
    document.goals = [result.as_dict() for result in results]
    print(describe_environment(document.environment))
    if document.floors:
        print(f"\n{floors_table(document.floors)}")
    print(f"\n{by_bpw_table(document.rows, labels)}")
    print(f"\n{goals_table(results)}\n")
    met = [result.met for result in results if result.complete]
    absent = sum(result.measured is None for result in results)
    partial = len(results) - len(met) - absent
    print(f"{met.count(True)} of {len(results)} goals met, {partial} measured in part, {absent} not measured")
    write_outputs(options, document)
    return 0


def _measure(options: Namespace, names: dict[str, str]) -> Document:
    import torch

    from benchmarks.layers.candidates import parse_candidate
    from benchmarks.layers.floors import measure_floors
    from benchmarks.layers.goal_runs import METHOD_DTYPES, measure_goals
    from benchmarks.layers.rows import Document, Row
    from benchmarks.layers.sweeping import Sweep, available
    from benchmarks.records import environment

    device = torch.device("cpu")
    shapes = parse_shapes(options.shapes)
    threads = [1, 2] if len(PROCESSORS) >= 2 else [1]
    document = Document(environment(device, threads))
    wanted = {method: parse_candidate(name, METHOD_DTYPES[method]) for method, name in names.items()}
    _, document.unavailable = available(wanted.values(), device)
    report_unavailable(document)
    usable = {m: c.name for m, c in wanted.items() if c.label not in document.unavailable}
    if not usable:
        # Peers alone say nothing about a goal.
        return document
    if options.quick:
        options.repetitions = min(options.repetitions, 3)
    how = settings(options, device)
    if not options.no_floors:
        document.floors = measure_floors(threads, device=device, timer=how.timer)
    before = torch.get_num_threads()
    try:
        # The checks too leave the other processors to whatever else runs.
        torch.set_num_threads(1)
        for measured in measure_goals(
            Sweep(how, document.floors),
            shapes=shapes,
            bpws=options.bpw,
            names=usable,
            threads=len(threads),
            progress=note,
        ):
            if isinstance(measured, Row):
                document.rows.append(measured)
            else:
                document.checks.append(measured)
    finally:
        torch.set_num_threads(before)
    return document
