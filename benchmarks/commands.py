"""What the subcommands of ``python -m benchmarks`` do with their options."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from benchmarks import PROCESSORS
from benchmarks.caches import default_cold_bytes
from benchmarks.layers.candidates import Candidate, dtype_name, parse_candidate
from benchmarks.layers.floors import floors_table, measure_floors
from benchmarks.layers.goals import by_bpw_table, evaluate, goals_table
from benchmarks.layers.goals_run import METHOD_DTYPES, measure_goals
from benchmarks.layers.sweep import Case, Entry, Settings, Sweep, available
from benchmarks.plots import write_plots
from benchmarks.problems import LARGE_SHAPES, SHAPES, Problem, Shape, parse_dtype, parse_shape
from benchmarks.records import Document, Row, environment, load_document, write_csv, write_json
from benchmarks.tables import describe_environment, rows_table
from benchmarks.timing import UnitTimer
from benchmarks.timing_cuda import timer_for

__all__ = ["floors", "goals", "plot", "run", "table"]


def run(options: Namespace) -> int:
    """Measure the product of the options; 1 if an error passes its bound."""
    device = _device(options.device)
    threads = _threads(options.threads, device)
    shapes = _shapes(options.shapes)
    dtypes = [parse_dtype(text) for text in options.dtypes]
    candidates, unavailable = available(_candidates(options.candidates, dtypes, device), device)
    document = Document(environment(device, threads), unavailable=unavailable)
    _report_unavailable(document)
    if not candidates:
        raise RuntimeError("candidates must hold one that can run, none of them can")
    settings = _settings(options, device)
    print(describe_environment(document))
    if not options.no_floors:
        document.floors = measure_floors(threads, device=device, timer=settings.timer, dtypes=dtypes)
        print(f"\n{floors_table(document.floors)}")
    sweep = Sweep(settings, document.floors)
    entries = [Entry(candidate, count) for candidate in candidates for count in threads]
    cases = [Case(tokens, mode, entries) for tokens in options.tokens for mode in options.modes]
    for shape in shapes:
        for bpw in options.bpw:
            rows = list(sweep.measure(Problem(shape, bpw, options.paths, device), cases))
            print(f"\n{rows_table(rows)}", flush=True)
            document.rows += rows
            if options.json is not None:
                write_json(options.json, document)  # kept if the run is stopped
    _write(options, document)
    return _refcheck_status(document.rows) if options.refcheck else 0


def goals(options: Namespace) -> int:
    """Print every goal beside what was measured, now or in the run of ``options.source``."""
    names = {"exact": options.exact, "int16": options.int16}
    labels = {method: f"{name} {dtype_name(METHOD_DTYPES[method])}" for method, name in names.items()}
    document = load_document(options.source) if options.source else _measure_goals(options, names)
    reasons = {
        method: document.unavailable[label]
        for method, label in labels.items()
        if label in document.unavailable
    }
    results = evaluate(document.rows, document.checks, labels, reasons=reasons)
    document.goals = [result.as_dict() for result in results]
    print(describe_environment(document))
    if document.floors:
        print(f"\n{floors_table(document.floors)}")
    print(f"\n{by_bpw_table(document.rows, labels)}")
    print(f"\n{goals_table(results)}\n")
    met = [result.met for result in results if result.complete]
    absent = sum(result.measured is None for result in results)
    partial = len(results) - len(met) - absent
    print(f"{met.count(True)} of {len(results)} goals met, {partial} measured in part, {absent} not measured")
    _write(options, document)
    return 0


def _measure_goals(options: Namespace, names: dict[str, str]) -> Document:
    device = torch.device("cpu")
    shapes = _shapes(options.shapes)
    threads = [1, 2] if len(PROCESSORS) >= 2 else [1]
    document = Document(environment(device, threads))
    wanted = {method: parse_candidate(name, METHOD_DTYPES[method]) for method, name in names.items()}
    _, document.unavailable = available(wanted.values(), device)
    _report_unavailable(document)
    usable = {m: c.name for m, c in wanted.items() if c.label not in document.unavailable}
    if not usable:
        # Peers alone say nothing about a goal.
        return document
    if options.quick:
        options.repetitions = min(options.repetitions, 3)
    settings = _settings(options, device)
    if not options.no_floors:
        document.floors = measure_floors(threads, device=device, timer=settings.timer)
    before = torch.get_num_threads()
    try:
        # The checks too are to leave the other processors to whatever else runs.
        torch.set_num_threads(1)
        for measured in measure_goals(
            Sweep(settings, document.floors),
            shapes=shapes,
            bpws=options.bpw,
            names=usable,
            threads=len(threads),
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        ):
            if isinstance(measured, Row):
                document.rows.append(measured)
            else:
                document.checks.append(measured)
    finally:
        torch.set_num_threads(before)
    return document


def floors(options: Namespace) -> int:
    """Print what the machine can do."""
    device = _device(options.device)
    threads = _threads(options.threads or sorted({1, len(PROCESSORS)}), device)
    measured = measure_floors(
        threads,
        device=device,
        timer=timer_for(device),
        dtypes=[parse_dtype(text) for text in options.dtypes],
        nbytes=None if options.mib is None else int(options.mib * 2**20),
        size=options.size,
    )
    print(floors_table(measured))
    return 0


def table(options: Namespace) -> int:
    """Print the rows of a JSON as a markdown table."""
    document = load_document(options.json)
    print(describe_environment(document))
    if document.floors:
        print(f"\n{floors_table(document.floors)}")
    print(f"\n{rows_table(document.rows)}")
    return 0


def plot(options: Namespace) -> int:
    """Plot the rows of a JSON."""
    for path in write_plots(load_document(options.json), options.out):
        print(path)
    return 0


def _device(text: str) -> torch.device:
    device = torch.device(text)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RuntimeError(f"device {text!r} cannot be used: torch finds no usable GPU")
    device = torch.device("cuda", device.index or 0)
    # Streams, events and graphs belong to the current device.
    torch.cuda.set_device(device)
    return device


def _threads(threads: Sequence[int], device: torch.device) -> list[int]:
    if device.type != "cpu":
        return [0]
    most = len(PROCESSORS)
    if max(threads) > most:
        raise ValueError(f"threads must be at most the {most} processors of this process, got {max(threads)}")
    return list(dict.fromkeys(threads))


def _shapes(names: Sequence[str]) -> list[Shape]:
    groups = {"large": list(LARGE_SHAPES), "all": list(SHAPES)}
    return [parse_shape(text) for name in names for text in groups.get(name, [name])]


def _candidates(names: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device) -> list[Candidate]:
    """Every candidate in every dtype; on the CPU dense and low-rank in float32 as well."""
    wanted = {}
    for name in dict.fromkeys(names):
        always = [torch.float32] if device.type == "cpu" and name in ("dense", "low-rank") else []
        for dtype in dict.fromkeys([*dtypes, *always]):
            candidate = parse_candidate(name, dtype)
            wanted[candidate.label] = candidate
    return list(wanted.values())


def _settings(options: Namespace, device: torch.device) -> Settings:
    cold = default_cold_bytes(device) if options.cold_mib is None else int(options.cold_mib * 2**20)
    return Settings(
        device=device,
        timer=UnitTimer()
        if getattr(options, "unit_times", False)
        else timer_for(device, graphs=not getattr(options, "no_graphs", False)),
        repetitions=options.repetitions,
        seconds=options.seconds,
        cold_bytes=cold,
        memory_bytes=int(options.memory_gib * 2**30),
        refcheck=getattr(options, "refcheck", False),
    )


def _report_unavailable(document: Document) -> None:
    for label, reason in document.unavailable.items():
        print(f"not measured: {label}: {reason}", file=sys.stderr)


def _refcheck_status(rows: Sequence[Row]) -> int:
    status = 0
    for row in rows:
        # Written so that an error that is no number fails.
        if row.error is not None and row.error_bound is not None and not row.error <= row.error_bound:
            print(
                f"error: {row.label} on {row.group}: relative error must be at most {row.error_bound:.1e}, "
                f"got {row.error:.1e}",
                file=sys.stderr,
            )
            status = 1
    return status


def _write(options: Namespace, document: Document) -> None:
    if options.json is not None:
        print(f"\nwrote {write_json(options.json, document)}", file=sys.stderr)
    if options.csv is not None:
        print(f"wrote {write_csv(options.csv, document)}", file=sys.stderr)
