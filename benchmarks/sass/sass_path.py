"""Count cycles of a layer's decode kernels by phase, from their machine code. Nothing runs on a GPU.

The kernels are compiled by nvcc and disassembled; each instruction's control bits (stall counts, scoreboards)
are decoded, and the warps of one block are followed through the branches and loops that the call's own
parameters decide. Assumed are the latencies of memory and units, which are printed. Not counted: other warps
on a scheduler, throughput of units, misses of the instruction and constant caches. The cycles are a lower
bound, good for comparing one version of a kernel with another.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.options import add_json, positive
from benchmarks.records import ROOT
from benchmarks.shapes import parse_shape

__all__ = ["add_arguments", "run"]

MOST_TOKENS = 16  # of the decode kernels' tiles
THREADS = 256  # of a block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kernel", choices=("decode",), metavar="KERNEL", help="decode")
    parser.add_argument(
        "--arch", nargs="+", type=int, default=[90], help="80, 86, 89, 90, 100 or 120 (default: 90)"
    )
    parser.add_argument(
        "--shapes", "--shape", nargs="+", default=["8192,28672"], help="K,N, KxN, or names as of sweep"
    )
    parser.add_argument("--bpw", nargs="+", type=positive(float), default=[0.1])
    parser.add_argument(
        "--activation", default="int16", help="exact, float16, int16, int8 or sign (default: int16)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="float32, float16 or bfloat16 (default: bfloat16)"
    )
    parser.add_argument("--tokens", nargs="+", type=positive(int), default=[1], metavar="M", help="1 to 16")
    add_json(parser)


def run(options: Namespace) -> int:
    """Print the table."""
    from benchmarks.records import host_environment, write_result
    from benchmarks.sass.block import BARRIER, PHASES
    from benchmarks.sass.launches import ACTIVATIONS, DEVICES, DTYPES
    from benchmarks.sass.warp import LATENCIES

    choices: tuple[tuple[str, list[Any], Any], ...] = (
        ("activation", [options.activation], ACTIVATIONS),
        ("dtype", [options.dtype], DTYPES),
        ("arch", options.arch, DEVICES),
    )
    for name, wanted, known in choices:
        if unknown := [value for value in wanted if value not in known]:
            raise ValueError(f"--{name} must be of {', '.join(map(str, known))}, got {unknown[0]}")
    if max(options.tokens) > MOST_TOKENS:
        raise ValueError(f"--tokens must be 1 to {MOST_TOKENS}, got {max(options.tokens)}")
    with tempfile.TemporaryDirectory() as folder:
        found = [row for arch in options.arch for row in _rows(options, arch, Path(folder))]
    head = ["arch", "shape", "bpw", "M", "launch", "grid", *PHASES]
    head += ["from the wait on", "instructions", "registers", "KiB of code", "touched"]
    print(markdown(head, [_cells(row) for row in found]))
    assumed = ", ".join(f"{name} {cycles}" for name, cycles in {**LATENCIES, "barrier": BARRIER}.items())
    print(f"\nAssumed cycles: {assumed}. Counted for the first block of each grid alone; nothing was run.")
    if options.json is not None:
        write_result(options.json, options, host_environment(), paths=found, latencies=dict(LATENCIES))
    return 0


def _rows(options: Namespace, arch: int, folder: Path) -> Iterator[dict[str, Any]]:
    from benchmarks.problems import Problem
    from benchmarks.sass.block import walk_block
    from benchmarks.sass.launches import compile_kernels, kernel_of, plan_launches

    source = ROOT / "csrc" / "cuda" / "instances" / f"decode_{options.activation}.cu"
    kernels = compile_kernels(source, arch, folder)
    for name, bpw, tokens in itertools.product(options.shapes, options.bpw, options.tokens):
        problem = Problem(parse_shape(name.replace("x", ",")), bpw)
        packed = problem.quick_packed()
        sizes = (packed.in_features, packed.out_features)
        call = (options.activation, options.dtype, tokens, sizes, packed.ranks or ())
        for launch in plan_launches(folder, arch, *call):
            kernel = kernel_of(kernels, launch)
            path = walk_block(kernel.code, arch, launch.params, {}, THREADS, kernel.literals)
            yield {
                "arch": arch,
                "shape": problem.shape.label,
                "bpw": bpw,
                "tokens": tokens,
                "launch": f"{launch.kind} {launch.stage + 1}",
                "grid": launch.grid,
                "cycles": path.cycles,
                "after_wait": path.after_wait,
                "instructions": path.instructions,
                "registers": kernel.registers,
                "code_bytes": kernel.code_bytes,
                "touched_bytes": path.code_bytes,
                "assumed_branches": path.assumed,
                "early_loads": path.early_loads,
            }


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"sm_{row['arch']}",
        row["shape"],
        f"{row['bpw']:g}",
        str(row["tokens"]),
        row["launch"],
        "x".join(map(str, row["grid"][:2])),
        *map(str, row["cycles"]),
        *(str(row[key]) for key in ("after_wait", "instructions", "registers")),
        *(f"{row[key] / 1024:.1f}" for key in ("code_bytes", "touched_bytes")),
    ]
