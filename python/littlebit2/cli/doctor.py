"""``littlebit2 doctor``: what was built, what runs on this machine, and whether results are right."""

from __future__ import annotations

import argparse

from .common import FAILED, Commands, add_command, emit, emit_json


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "doctor",
        _run,
        summary="what was installed, what runs on this machine, and a self-test of every backend",
        description="Say which versions are installed and which kernels were built, try every backend that "
        "can run on this machine on small layers against float64, and say why the others cannot. The exit "
        "code is 1 if a result is wrong or the CPU kernels cannot run.",
        examples="  littlebit2 doctor\n  littlebit2 doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _run(args: argparse.Namespace) -> int:
    from littlebit2_kernels.diagnostics import collect, self_tests  # noqa: PLC0415  # imports torch

    report, tests = collect(), self_tests()
    code = 0 if all(test.passed is not False for test in tests) else FAILED
    if args.json:
        emit_json({**report, "self_tests": [test._asdict() for test in tests]})
        return code
    package, native = report["package"], report["native"]
    emit(f"littlebit2 {package['littlebit2_kernels']}, Python {package['python']}, torch {package['torch']}")
    emit(f"triton {package['triton'] or 'not installed'}, {package['platform']}")
    if "error" in native:
        emit(f"libraries: {native['error']}")
    else:
        emit(f"libraries: compiled by {native['compiler']}; CUDA kernels for: {native['cuda_kernels']}")
    emit()
    width = max(len(test.name) for test in tests)
    for test in tests:
        mark = {True: "ok", False: "FAIL", None: "-"}[test.passed]
        emit(f"{mark:<6}{test.name:<{width}}  {test.outcome}")
    return code
