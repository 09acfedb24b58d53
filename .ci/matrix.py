"""Run the Python tests in random orders, with other threads and instruction sets: ``matrix.py [ROW ...]``.

Three runs cover every setting once, and the pairs that have reason to meet:

| row | order | OMP threads | torch's kernels | oneDNN | our kernels |
|---|---|---|---|---|---|
| native | random, seed 1 | 2 | the best | the best | the best |
| avx2 | random, seed 2 | 1 | avx2 | AVX2 | avx2 |
| plain | random, seed 3 | 2 | default | AVX2 | scalar |

The order is random among files and within each file; every file stays in one process, which shares its
fixtures. The rows ``avx2`` and ``plain`` leave out what compiles for GPUs: no setting of theirs reaches a
compiler. A row that this machine cannot run is reported as skipped. The exit status is 0 if every row
that ran has passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from littlebit2_kernels._native import core

ROOT = Path(__file__).resolve().parents[1]

#: Files that run compilers for GPUs, and nothing on this CPU.
COMPILERS = ("tests/kernels/test_cuda_build.py", "tests/triton/test_ahead.py")


@dataclass(frozen=True)
class Row:
    """One run of pytest: the seed of its order, its threads, and what limits the instruction sets."""

    seed: int
    threads: int
    limits: Mapping[str, str] = field(default_factory=dict)


ROWS = {
    "native": Row(seed=1, threads=2),
    "avx2": Row(
        seed=2,
        threads=1,
        limits={"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "LB2_CPU_ISA": "avx2"},
    ),
    "plain": Row(
        seed=3,
        threads=2,
        limits={"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "LB2_CPU_ISA": "scalar"},
    ),
}


def why_not(row: Row, isas: list[str], cores: int) -> str | None:
    """Say why this machine cannot run a row, or None."""
    isa = row.limits.get("LB2_CPU_ISA")
    if isa is not None and isa not in isas:
        return f"needs the instruction set {isa}, this CPU has {', '.join(isas)}"
    if row.threads > cores:
        return f"needs {row.threads} cores, this machine has {cores}"
    return None


def command(row: Row, processes: int) -> list[str]:
    """The pytest command of a row."""
    ignored = [f"--ignore={file}" for file in COMPILERS] if row.limits else []
    return [
        *(sys.executable, "-m", "pytest"),
        *("-n", str(max(1, processes // row.threads)), "--dist", "loadfile", "--no-loadscope-reorder"),
        *("--random-order-bucket=global", f"--random-order-seed={row.seed}"),
        *ignored,
    ]


def main(arguments: list[str]) -> int:
    """Run the rows, and print what became of each."""
    parser = argparse.ArgumentParser(description="Run the Python tests in orders and settings of their own.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.rows) - set(ROWS))
    if unknown:
        parser.error(f"ROW must be one of {', '.join(ROWS)}, got {', '.join(unknown)}")

    results = {}
    for name in options.rows or ROWS:
        row = ROWS[name]
        reason = why_not(row, core().cpu_isas(), os.cpu_count() or 1)
        if reason is not None:
            results[name] = f"skipped: {reason}"
            continue
        settings = {**row.limits, "OMP_NUM_THREADS": str(row.threads)}
        print(f"== {name}: order {row.seed}, {settings}", flush=True)
        done = subprocess.run(
            command(row, options.processes), cwd=ROOT, env={**os.environ, **settings}, check=False
        )
        results[name] = "passed" if done.returncode == 0 else f"failed with status {done.returncode}"
    print("== matrix")
    for name, result in results.items():
        print(f"{name}: {result}")
    return int(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
