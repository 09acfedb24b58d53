"""Count the cycles of the inner loops for 64-bit ARM with llvm-mca. Nothing is run: the figures are counted.

The NEON kernels are compiled as CMake compiles them, beside two loops of dot products (sdot_loop.cpp), and
their inner loops are given to LLVM's models of cores. A model is LLVM's belief about a core: that of apple-m1
is of its ancestor with three vector units, and cortex-a76 has that of cortex-a57. What is counted has data in
the L1 cache, and no tables to build. Needs g++-aarch64-linux-gnu, cmake and LLVM 16 or newer.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.options import add_json, positive
from benchmarks.records import ROOT, host_environment, write_result

__all__ = ["CORES", "GOALS", "LOOPS", "Count", "Loop", "add_arguments", "count_cycles", "inner_loop", "run"]

CORES = ("apple-m1", "neoverse-n1", "neoverse-v2", "cortex-a76")
#: GMAC/s at 3 GHz of one token in int16, to be reached.
GOALS = {"neoverse-n1": 60.0, "apple-m1": 150.0}
_KERNELS = "csrc/cpu/isa/kernels_neon.cpp"
_SDOT = "benchmarks/estimates/sdot_loop.cpp"
_ITERATIONS = 1000


@dataclass(frozen=True)
class Loop:
    """An inner loop: where it is found, and what one pass does.

    Attributes:
        source: file of the repository.
        function: part of the mangled name of the function.
        instruction: what the loop is known by.
        times: how often it has that.
        macs: sign-accumulate operations of one pass.
    """

    source: str
    function: str
    instruction: str
    times: int
    macs: int


#: 32 rows of one word of 15 columns or, int16, of two; 16 rows of 32 columns in dot products.
LOOPS = {
    "lookup, exact": Loop(_KERNELS, "ExactBlocks", "tbl", 24, 32 * 15),
    "lookup, int16 and int8": Loop(_KERNELS, "Int16Blocks", "tbl", 24, 32 * 30),
    "lookup, sign": Loop(_KERNELS, "SignBlocks", "cnt", 4, 32 * 15),
    "sdot, two planes": Loop(_SDOT, "sdot_two_planes", "sdot", 64, 16 * 32),
    "sdot, one plane": Loop(_SDOT, "sdot_one_plane", "sdot", 32, 16 * 32),
}


@dataclass(frozen=True)
class Count:
    """Cycles of one pass of a loop on a core, and the rate at the chosen clock."""

    loop: str
    core: str
    cycles: float
    gmacs: float


def inner_loop(assembly: str, loop: Loop) -> str:
    """The instructions of a loop.

    Raises:
        ValueError: no loop of the function has the instruction as often as expected.
    """
    function, labels = "", {}
    lines = assembly.splitlines()
    found: list[list[str]] = []
    for i, line in enumerate(lines):
        if start := re.match(r"([A-Za-z_]\w*):", line):
            function, labels = start[1], {}
        elif label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        elif branch := re.match(r"\s+(?:b\.?[a-z]{2}|cbn?z|tbn?z)\s+(?:[\w#]+, )*(\.L\w+)", line):
            if loop.function not in function or branch[1] not in labels:
                continue
            body = [text for text in lines[labels[branch[1]] : i + 1] if re.match(r"\s+[a-z]", text)]
            if any(text.split()[0] == loop.instruction for text in body):
                found.append(body)
    # What contains the inner loop is longer.
    body = min(found, key=len, default=[])
    times = sum(text.split()[0] == loop.instruction for text in body)
    if times != loop.times:
        raise ValueError(
            f"the inner loop of {loop.function} must have {loop.times} times {loop.instruction}, "
            f"got {times}: the kernel changed, and so must LOOPS of this command"
        )
    return "\n".join(body) + "\n"


def count_cycles(analyzer: str, core: str, body: str) -> float:
    """Cycles of one pass of a loop, by llvm-mca."""
    options = ["-march=aarch64", "-mattr=+dotprod", f"-mcpu={core}", f"-iterations={_ITERATIONS}"]
    report = _output([analyzer, *options], body)
    total = re.search(r"^Total Cycles: +(\d+)$", report, re.MULTILINE)
    if total is None:
        raise ValueError(f"{analyzer} must print 'Total Cycles', got: {report[:200]}")
    return int(total[1]) / _ITERATIONS


def _output(command: Sequence[str], text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _tool(names: Sequence[str], package: str) -> str:
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise ValueError(f"{names[-1]} was not found; on Debian and Ubuntu install the package {package}")


def _kernels_command(compiler: str, folder: Path) -> list[str]:
    """How CMake compiles the kernels for 64-bit ARM, up to the files."""
    options = ("TORCH=OFF", "PYTHON=OFF", "TESTS=OFF")
    _output(
        [
            *(_tool(["cmake"], "cmake"), "-S", str(ROOT), "-B", str(folder)),
            *("--toolchain", str(ROOT / "cmake/aarch64-linux.cmake"), f"-DCMAKE_CXX_COMPILER={compiler}"),
            *(f"-DLB2_BUILD_{option}" for option in options),
            *("-DLB2_CUDA=off", "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        ]
    )
    commands = json.loads((folder / "compile_commands.json").read_text("utf-8"))
    (command,) = (shlex.split(row["command"]) for row in commands if row["file"].endswith(_KERNELS))
    return command[: command.index("-o")]


def _assemblies(compiler: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        kernels = _kernels_command(compiler, Path(folder))
        sdot = [compiler, "-std=c++17", "-O3", "-march=armv8.2-a+dotprod", "-fno-schedule-insns"]
        commands = {_KERNELS: kernels, _SDOT: sdot}
        return {
            source: _output([*command, "-S", "-o", "-", str(ROOT / source)])
            for source, command in commands.items()
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--cores", nargs="+", default=list(CORES), help="names of llvm-mca's -mcpu")
    parser.add_argument("--clock", type=positive(float), default=3.0, help="GHz; default: 3")
    parser.add_argument("--compiler", help="default: aarch64-linux-gnu-g++")
    parser.add_argument("--analyzer", help="default: the newest llvm-mca")
    add_json(parser)


def run(options: Namespace) -> int:
    """Print cycles and rates as a markdown table, and whether the goals are reached."""
    compiler = options.compiler or _tool(["aarch64-linux-gnu-g++"], "g++-aarch64-linux-gnu")
    names = [*(f"llvm-mca-{version}" for version in range(30, 15, -1)), "llvm-mca"]
    analyzer = options.analyzer or _tool(names, "llvm-19")
    version = re.search(r"version (\S+)", _output([analyzer, "--version"]))
    if version is None or int(version[1].split(".")[0]) < 16:
        raise ValueError(
            f"{analyzer} must be of LLVM 16 or newer, which knows neoverse-n1, got "
            f"{version[1] if version else 'an unknown version'}"
        )
    assemblies = _assemblies(compiler)
    counts = []
    for name, loop in LOOPS.items():
        body = inner_loop(assemblies[loop.source], loop)
        for core in options.cores:
            cycles = count_cycles(analyzer, core, body)
            counts.append(Count(name, core, cycles, loop.macs / cycles * options.clock))
    print(
        f"counted with llvm-mca {version[1]}, one token, {options.clock:g} GHz: "
        "cycles of a pass, GMAC/s of a core\n"
    )
    lines = [
        [name, str(loop.macs), *(f"{c.cycles:.1f}, {c.gmacs:.0f}" for c in counts if c.loop == name)]
        for name, loop in LOOPS.items()
    ]
    print(markdown(["loop", "MACs of a pass", *options.cores], lines))
    print()
    for count in counts:
        if "int16" in count.loop and count.core in GOALS and options.clock == 3.0:
            goal = GOALS[count.core]
            reached = "reached" if count.gmacs >= goal else "not reached"
            print(f"int16 on {count.core}: {count.gmacs:.0f} GMAC/s counted, the goal is {goal:g}: {reached}")
    if options.json is not None:
        write_result(options.json, options, host_environment(), llvm=version[1], counts=counts)
    return 0
