"""Takes the place of a step's command in a rehearsal, on a machine without a GPU.

It understands the command as the real one would, and writes a result of the same form with invented numbers.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.commands import command_parser
from benchmarks.cuda.suite import make
from benchmarks.layers.requests import parse_shapes
from benchmarks.layers.rows import Document, Row, write_document
from benchmarks.records import ROOT, host_environment, write_result

__all__ = ["main"]

_RATES = ("m16n8k256.b1.and.popc", "m16n8k16.f16, fp32 sums", "m16n8k32.s8")
_LAUNCHES = ("one after another", "chained, waits first", "chained, starts next first")


def _sweep(options: Namespace) -> None:
    rows = [
        Row(
            *("rehearsal", candidate, dtype, candidate.startswith("littlebit2"), shape.name),
            *(shape.in_features, shape.out_features, bpw, [8, 8], tokens, mode, 0, 1, 1, 1),
            *([1e-6], 1e-6, 1e-6, 1e-6),
            speedups={"dense": [1.0, 1.0, 1.0]},
        )
        for shape in parse_shapes(options.shapes)
        for bpw in options.bpw
        for tokens in options.tokens
        for mode in options.modes
        for candidate in options.candidates
        for dtype in options.dtypes
    ]
    write_document(options.json, options, Document(host_environment(), rows=rows))


def _benchmark(arguments: Sequence[str]) -> int:
    options = command_parser(arguments[0]).parse_args(arguments[1:])
    options.arguments = list(arguments)
    if arguments[0] == "sweep":
        _sweep(options)
    elif getattr(options, "json", None) is not None:
        write_result(options.json, options, host_environment(), rows=[])
    return 0


def _tests(arguments: Sequence[str]) -> int:
    paths = [part.partition("::")[0].removeprefix("--ignore=") for part in arguments if "tests/" in part]
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing or not paths:
        print(f"error: {missing or 'no tests'} cannot be run")
        return 4
    print("\n3 passed in 0.01s")
    return 0


def _program(name: str, arguments: Sequence[str]) -> int:
    contents = {
        "mma_rates": {"rates": [{"mma": mma, "per_sm_per_second": 1e9, "clock_hz": 1e9} for mma in _RATES]},
        "boundary": {
            "launches": 1,
            "boundaries": [
                {"blocks": blocks, "launch": launch, "us": 1.0} for blocks in (1, 132) for launch in _LAUNCHES
            ],
        },
    }.get(name, {"gpu": "none"})
    Path(arguments[0]).write_text(json.dumps(contents) + "\n", "utf-8")
    return 0


def _profile(arguments: Sequence[str]) -> int:
    head = '"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"'
    names = ("gpu__time_duration.sum", "Registers Per Thread", "L2 Hit Rate")
    rows = [
        f'"{launch}","decode","({grid}, 1, 1)","","{name}","","1"'
        for launch, grid in ((0, 76), (1, 224))
        for name in names
    ]
    target = arguments[arguments.index("--log-file") + 1]
    Path(target).write_text("\n".join(("==PROF== a line of the profiler", head, *rows)) + "\n", "utf-8")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Stand in for a command; 2 for one that has no stand-in."""
    program = Path(arguments[0]).name
    if "pytest" in arguments:
        return _tests(arguments)
    if program == "ncu":
        return _profile(arguments)
    module = arguments[2] if arguments[1:2] == ["-m"] else ""
    if module == "benchmarks":
        return _benchmark(arguments[3:])
    if module == "benchmarks.cuda.suite.make":
        what = arguments[3]
        return 0 if what == "library" or (ROOT / "benchmarks/cuda" / f"{what}.cu").is_file() else 2
    if module in ("littlebit2_kernels.diagnostics", "pip"):
        return 0
    if program in make.CARRIED or "variants" in program:
        return _program(program, arguments[1:])
    print(f"error: there is no stand-in for {' '.join(arguments)}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
