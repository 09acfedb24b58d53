"""On a GPU machine without a network: build, test and measure everything.

Every step is a command with a time limit of its own; a step that fails stops only the steps that need it.
Steps come in groups; each group, with the steps that set the machine up, fits into ten minutes. The JSON
files of the measurements, the results of all steps (suite.json) and their output (suite.log) go to --out;
a table of the steps is printed last. --dry-run prints the commands, and runs the measurements without a
GPU on small problems.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import ROOT, host_environment, write_result

__all__ = ["STEPS", "Folders", "Result", "Step", "add_arguments", "run", "run_step"]

PYTHON = sys.executable or "python3"
OURS = [f"littlebit2:cuda:{mode}" for mode in ("int16", "float16", "int8", "sign")]
TRITON = [f"littlebit2:triton:{mode}" for mode in ("exact", "float16", "int8", "sign")]
#: Those of the goals first: a measurement that runs out of time keeps what it has.
PEERS = ["dense", "low-rank"]
MODEL_SHAPES = [
    "llama2-70b-up",
    "llama2-7b-up",
    "llama2-7b-qo",
    "llama2-70b-down",
    "llama2-7b-down",
    "llama3-8b-kv",
]


PREFILL_SHAPES = ["llama2-70b-up", "llama2-7b-qo", "llama2-7b-up"]

#: Options that make a step's command a dry run: from end to end on the CPU, small, without taking times.
SMALL = {
    "sweep": "--device cpu --shapes 256,128 --tokens 1 --bpw 1 --cold-mib 0.05 --unit-times",
    "tune-triton": "--dry-run --shapes 2048,2048",
    "whole-model": "--device cpu --shape tiny --steps generate --bpw 1 --prompt 4 --tokens 3 --rounds 1",
}


@dataclass(frozen=True)
class Folders:
    """``out`` for what is to be kept, ``work`` for programs and logs, ``wheels`` with packages to install."""

    out: Path
    work: Path
    wheels: Path


@dataclass(frozen=True)
class Step:
    """One command of the suite.

    Attributes:
        name: name for ``--steps``.
        group: name for ``--groups``; ``"setup"`` is part of every group.
        command: arguments; ``{out}``, ``{work}`` and ``{wheels}`` stand for folders.
        seconds: time limit.
        needs: steps that must have passed, if they were asked for.
        variables: variables added to the environment.
    """

    name: str
    group: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ("build",)
    variables: tuple[tuple[str, str], ...] = ()

    def arguments(self, folders: Folders) -> list[str]:
        """The command with its folders filled in."""
        names = {name: str(folder) for name, folder in vars(folders).items()}
        return [part.format(arch="{arch}", **names) for part in self.command]


@dataclass(frozen=True)
class Result:
    """What became of a step: ``state`` is ``"passed"``, ``"failed"``, ``"timed out"``, ``"skipped: ..."``."""

    name: str
    state: str
    seconds: float
    log: str


def _measure(
    name: str, tokens: Sequence[int], candidates: Sequence[str], *more: str, shapes: Sequence[str] = ()
) -> tuple[str, ...]:
    command = (PYTHON, "-m", "benchmarks", "sweep", "--device", "cuda", "--dtypes", "float16", "--no-floors")
    command += ("--candidates", *candidates, "--shapes", *(shapes or MODEL_SHAPES))
    command += ("--tokens", *map(str, tokens))
    command += ("--repetitions", "5")
    return (*command, *more, "--json", f"{{out}}/{name}.json")


_INDEXLESS = (PYTHON, "-m", "pip", "install", "-q", "--no-index")
_PIP = (*_INDEXLESS, "--no-deps", "--no-build-isolation")
#: The slow tests too: on a GPU their sweeps take seconds.
_PYTEST = (PYTHON, "-m", "pytest", "-q", "-m", "", "--maxfail=20", "-p", "no:cacheprovider")
#: What a measurement needs: one wrong result in a thousand problems is no reason to measure nothing.
_USABLE = ("build", "diagnostics")


def _sanitized(tool: str) -> Step:
    # Everything of a few dozen problems: under these tools a launch takes up to a hundred times as long.
    tests = [
        f"tests/cuda/test_cuda_linear.py::{name}"
        for name in (
            "test_random_problems[0]",
            "test_layouts_of_words",
            "test_both_stages_in_one_kernel[[80, 72]-float16]",
            "test_unpacked",
        )
    ]
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_PYTEST)
    # Torch's allocator hands out parts of large blocks, past whose ends nothing is found.
    variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(tool, "check", (*command, *tests), 90, _USABLE, variables)


def _program(
    name: str, seconds: int, *arguments: str, library: bool = True, source: str = "", group: str = "variants"
) -> tuple[Step, Step]:
    """A measurement in CUDA C++, below torch, ``source`` or of its own name: compiled here, then run."""
    build = ["nvcc", "-std=c++17", "-O3", "-arch={arch}"]
    build += [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "benchmarks")]
    build.append(str(ROOT / "benchmarks" / "cuda" / f"{source or name}.cu"))
    if library:
        lib = ROOT / "littlebit2_kernels" / "lib"
        build += [f"-L{lib}", f"-Xlinker=-rpath={lib}", "-llittlebit2_cuda", "-llittlebit2"]
    build += ["-o", f"{{work}}/{name}"]
    first = Step(f"build-{name}", group, tuple(build), 40, _USABLE if library else ())
    return first, Step(name, group, (f"{{work}}/{name}", *arguments), seconds, (first.name,))


_TUNE = (PYTHON, "-m", "benchmarks", "tune-triton", "--bpw", "0.1")


def _model(shape: str, seconds: int, *more: str) -> Step:
    command = (PYTHON, "-m", "benchmarks", "whole-model", "--device", "cuda", "--shape", shape)
    command += ("--rounds", "3", "--tokens", "64", *more, "--json", f"{{out}}/{shape}.json")
    return Step(f"model-{shape}", "models", command, seconds, ("build", "diagnostics", "transformers"))


STEPS = (
    Step("wheels", "setup", (*_PIP, "--find-links", "{wheels}", "pybind11", "gemlite"), 20, ()),
    Step("build", "setup", (*_PIP, "-e", str(ROOT)), 150, ()),
    Step("diagnostics", "setup", (PYTHON, "-m", "littlebit2_kernels.diagnostics", "--require-gpu"), 20),
    Step("tests", "check", (*_PYTEST, "tests/cuda"), 180),
    _sanitized("memcheck"),
    _sanitized("racecheck"),
    # Which mode wins at one token, at every bits per weight, beside the peers.
    Step(
        "decode",
        "decode",
        _measure(
            "decode", [1], [*OURS, "dense", "low-rank"], "--bpw", "0.1", "0.3", "0.55", "1.0", "--refcheck"
        ),
        200,
        _USABLE,
    ),
    # Eager calls: what the host adds to a launch.
    Step(
        "eager",
        "decode",
        _measure("eager", [1], [OURS[0], "dense"], "--bpw", "0.1", "--no-graphs", "--modes", "hot"),
        40,
        _USABLE,
    ),
    Step(
        "batches",
        "decode",
        _measure("batches", [2, 4, 8, 16], [*OURS[:2], *PEERS], "--bpw", "0.1", "0.55"),
        130,
        _USABLE,
    ),
    # How fast the tensor cores are, and what the planner could have chosen better.
    *_program("mma_rates", 10, "{out}/mma_rates.json", library=False),
    *_program("variants", 120, "{out}/variants.jsonl", "--tokens", "1", "8"),
    # GemLite tunes itself for every shape first.
    Step(
        "gemlite",
        "variants",
        _measure("gemlite", [1, 8], [OURS[0], "dense", "gemlite"], "--bpw", "0.1", "1.0", "--modes", "cold"),
        150,
        _USABLE,
    ),
    # Triton's kernels need no build of their own, but compile while they run.
    Step(
        "triton-tests",
        "triton",
        (*_PYTEST, "tests/triton/kernels", "tests/triton/test_compiled.py"),
        210,
        _USABLE,
    ),
    Step(
        "triton-decode",
        "triton",
        _measure("triton-decode", [1, 16], [OURS[0], *TRITON, *PEERS], "--bpw", "0.1", "--refcheck"),
        130,
        _USABLE,
    ),
    # Where one launch does a small layer faster than two (FUSED_SIGNS in triton/plan.py): the log has both.
    Step(
        "triton-fused",
        "triton",
        (
            *(*_TUNE, "--kernels", "decode", "--tokens", "1", "--shapes"),
            *("1024,1024", "2048,2048", "llama2-7b-qo", "llama3-8b-kv"),
        ),
        40,
        _USABLE,
    ),
    # The GEMM beside every other backend for prefill: whether `auto` chooses the fastest.
    Step(
        "prefill",
        "prefill",
        _measure(
            "prefill",
            [32, 128, 512, 2048, 8192],
            [OURS[1], TRITON[1], "littlebit2:blas:auto", *PEERS, "unpack", OURS[2], TRITON[2]],
            *("--bpw", "0.1", "1.0", "--modes", "hot", "--dtypes", "bfloat16"),
            shapes=PREFILL_SHAPES,
        ),
        230,
        _USABLE,
    ),
    # Few tokens of many users; from 17 on they take the GEMM too.
    Step(
        "prefill-small",
        "prefill",
        _measure(
            "prefill-small", [16, 17, 24, 48, 64], [*OURS[:2], *PEERS], "--bpw", "0.1", shapes=PREFILL_SHAPES
        ),
        60,
        _USABLE,
    ),
    Step(
        "prefill-gemlite",
        "prefill",
        _measure(
            "prefill-gemlite",
            [32, 512, 2048],
            [OURS[1], "littlebit2:blas:auto", "dense", "gemlite"],
            *("--bpw", "0.1", "--modes", "hot"),
            shapes=PREFILL_SHAPES[-1:],
        ),
        90,
        _USABLE,
    ),
    # Triton's kernels at the sizes that have tuned configurations, and how much tuning gains.
    Step(
        "prefill-triton",
        "prefill-triton",
        _measure("prefill-triton", [32, 128, 512, 2048], [OURS[1], *TRITON[1:3], *PEERS], "--bpw", "0.1"),
        200,
        _USABLE,
    ),
    Step(
        "triton-tune",
        "prefill-triton",
        (*_TUNE, "--shapes", "llama2-7b-up", "--tokens", "1", "64"),
        170,
        _USABLE,
    ),
    # What the planner could have chosen better for prefill: tiles, splits, one kernel for both stages, whose
    # clusters must all give the bits of the GEMM.
    *_program(
        "prefill-variants",
        240,
        "{out}/prefill_variants.jsonl",
        *("--tokens", "64", "512", "2048", "--modes", "float16", "--repetitions", "3"),
        source="variants",
        group="prefill-variants",
    ),
    # Whole models of random weights beside dense ones: tokens per second and memory.
    Step("transformers", "models", (*_INDEXLESS, "--find-links", "{wheels}", "transformers"), 40, ()),
    _model(
        "llama2-7b",
        170,
        "--bpw",
        "0.1",
        "1.0",
        "--steps",
        "graph",
        "compile",
        "--prompt",
        "512",
    ),
    _model("llama2-13b", 90, "--bpw", "0.1", "--prompt", "128"),
    _model("llama3-8b", 70, "--bpw", "0.1", "--prompt", "128"),
)


@functools.cache
def _capability() -> str:
    """``"90"`` on an H100 or H200, and where there is no GPU."""
    print_it = "import torch; print('{}{}'.format(*torch.cuda.get_device_capability()))"
    asked = subprocess.run([PYTHON, "-c", print_it], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "90"


def run_step(step: Step, folders: Folders, done: dict[str, Result], seconds: float = math.inf) -> Result:
    """Run one step in at most ``seconds``, unless one that it needs has not passed.

    Its output goes to ``work/<name>.log``. What it leaves running is ended.
    """
    for name in step.needs:
        if name in done and done[name].state != "passed":
            return Result(step.name, f"skipped: {name} {done[name].state}", 0.0, "")
    if seconds < 1:
        return Result(step.name, "skipped: out of time", 0.0, "")
    log = folders.work / f"{step.name}.log"
    environment = {
        # CUDA kernels also where the tool that builds them does not see a GPU.
        "LB2_CUDA": "on",
        "LB2_CUDA_ARCHS": f"{_capability()}-real",
        # The machine is this suite's, whoever manages its Python.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        **os.environ,
        **dict(step.variables),
    }
    arguments = [part.replace("{arch}", f"sm_{_capability()}") for part in step.arguments(folders)]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Result(step.name, f"failed: {error}", 0.0, str(log))
        try:
            code = process.wait(min(step.seconds, seconds))
            state = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            # Compilers and tests that outlive their parent would go on beside the next measurement.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(step.name, state, time.monotonic() - start, str(log))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names = [step.name for step in STEPS]
    groups = [group for group in dict.fromkeys(step.group for step in STEPS) if group != "setup"]
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups, help="default: all")
    parser.add_argument(
        "--steps", nargs="+", choices=names, metavar="STEP", help="in place of groups: " + ", ".join(names)
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all steps together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_suite_out")))
    parser.add_argument(
        "--wheels",
        type=Path,
        default=ROOT / "wheels",
        help="folder with pybind11, gemlite, and transformers with what it needs",
    )
    parser.add_argument("--dry-run", action="store_true")


def _dry_run(steps: Sequence[Step], folders: Folders) -> int:
    from benchmarks.__main__ import main

    for step in steps:
        arguments = step.arguments(folders)
        print(f"{step.name} (at most {step.seconds} s): {' '.join(arguments)}")
        if arguments[1:3] == ["-m", "benchmarks"]:
            small = SMALL[arguments[3]].split()
            with tempfile.TemporaryDirectory() as folder:
                output = ["--json", f"{folder}/rows.json"] if "--json" in arguments else []
                status = main([*arguments[3:], *small, *output])
            if status != 0:
                return status
        elif shutil.which(arguments[0]) is None and not arguments[0].startswith(str(folders.work)):
            print(f"  {arguments[0]} is not on this machine")
    return 0


def run(options: Namespace) -> int:
    """Run the chosen steps; returns 1 if one did not pass."""
    wanted = {*options.groups, "setup"}
    steps = [
        step for step in STEPS if (step.name in options.steps if options.steps else step.group in wanted)
    ]
    folders = Folders(options.out.resolve(), ROOT / "build" / "gpu_suite", options.wheels.resolve())
    if options.dry_run:
        return _dry_run(steps, folders)
    end = time.monotonic() + options.seconds
    folders.out.mkdir(parents=True, exist_ok=True)
    folders.work.mkdir(parents=True, exist_ok=True)
    done: dict[str, Result] = {}
    with (folders.out / "suite.log").open("w", encoding="utf-8") as together:
        for step in steps:
            result = done[step.name] = run_step(step, folders, done, end - time.monotonic())
            output = Path(result.log).read_text("utf-8", "replace") if result.log else ""
            print(f"=== {step.name}: {result.state}\n{output}", file=together, flush=True)
            results = list(done.values())
            write_result(folders.out / "suite.json", options, host_environment(), steps=results)
            if result.state != "passed":
                print(f"--- end of {step.name}\n{output[-1500:]}", flush=True)
    for result in done.values():
        print(f"{result.name:<16} {result.seconds:7.1f} s  {result.state}")
    return int(any(result.state != "passed" for result in done.values()))
