"""``python3 -m benchmarks.gpu_suite``: on a GPU machine without a network, builds, tests and measures.

Every step is a command with a limit of its own; a step that fails does not stop those that can do without it.
Logs and the JSON of the measurements go to ``--out``, a table of the steps is printed last. ``--dry-run``
prints the commands and checks, without a GPU, that their arguments are understood.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["STEPS", "Result", "Step", "main", "run_step"]

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable or "python3"
OURS = [f"littlebit2:cuda:{mode}" for mode in ("int16", "float16", "int8", "sign")]
PEERS = ["dense", "low-rank", "gemlite"]
#: Those of the goals first: a measurement that runs out of time keeps what it has.
MODEL_SHAPES = [
    "llama2-70b-up",
    "llama2-7b-up",
    "llama2-7b-qo",
    "llama2-70b-down",
    "llama2-7b-down",
    "llama3-8b-kv",
]


#: What makes a measurement a dry run: from end to end on the CPU, small, without taking times.
SMALL = ["--device", "cpu", "--shapes", "256,128", "--tokens", "1", "--bpw", "1"]
SMALL += ["--cold-mib", "0.05", "--unit-times"]


@dataclass(frozen=True)
class Step:
    """One command of the suite.

    Attributes:
        name: as in ``--steps``.
        command: arguments; ``{out}`` and ``{wheels}`` stand for folders.
        seconds: limit.
        needs: steps that must have succeeded, where they were asked for.
        variables: added to the environment.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ("build",)
    variables: tuple[tuple[str, str], ...] = ()

    def arguments(self, out: Path, wheels: Path) -> list[str]:
        """The command with its folders filled in."""
        return [part.format(out=out, wheels=wheels) for part in self.command]


@dataclass(frozen=True)
class Result:
    """What became of a step: ``state`` is ``"passed"``, ``"failed"``, ``"timed out"``, ``"skipped: ..."``."""

    name: str
    state: str
    seconds: float
    log: str


def _measure(name: str, tokens: Sequence[int], candidates: Sequence[str], *more: str) -> tuple[str, ...]:
    command = (PYTHON, "-m", "benchmarks", "run", "--device", "cuda", "--dtypes", "float16", "--no-floors")
    command += ("--candidates", *candidates, "--shapes", *MODEL_SHAPES, "--tokens", *map(str, tokens))
    command += ("--repetitions", "5")
    return (*command, *more, "--json", f"{{out}}/{name}.json")


_PIP = (PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation")
_PYTEST = (PYTHON, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider")
#: What a measurement needs: one wrong result in a thousand problems is no reason to measure nothing.
_USABLE = ("build", "diagnostics")


def _sanitized(tool: str) -> Step:
    # Everything of a few dozen problems: under these tools a launch takes up to a hundred times as long.
    tests = [
        f"tests/cuda/test_cuda_linear.py::{name}"
        for name in ("test_random_problems[0]", "test_layouts_of_words")
    ]
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_PYTEST)
    # Torch's allocator hands out parts of large blocks, past whose ends nothing is found.
    variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(tool, (*command, *tests), 240, _USABLE, variables)


def _program(name: str, seconds: int, *arguments: str) -> tuple[Step, Step]:
    """A measurement in CUDA C++, below torch: compiled for this GPU, then run."""
    library = ROOT / "littlebit2_kernels"
    compile_it = (
        "nvcc",
        "-std=c++17",
        "-O3",
        "-arch=native",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'benchmarks'}",
    )
    compile_it += (
        f"-I{ROOT / 'csrc' / 'include'}",
        f"-L{library / 'lib'}",
        f"-Xlinker=-rpath={library / 'lib'}",
    )
    compile_it += (str(ROOT / "benchmarks" / "cuda" / f"{name}.cu"), "-llittlebit2_cuda", "-llittlebit2")
    build = Step(f"build-{name}", (*compile_it, "-o", f"{{out}}/{name}"), 120)
    return build, Step(name, (f"{{out}}/{name}", *arguments), seconds, (*_USABLE, build.name))


STEPS = (
    Step("wheels", (*_PIP, "--find-links", "{wheels}", "pybind11", "gemlite"), 60, ()),
    Step("build", (*_PIP, "-e", str(ROOT)), 300, ()),
    Step("diagnostics", (PYTHON, "-m", "littlebit2_kernels.diagnostics", "--require-gpu"), 60),
    Step("tests", (*_PYTEST, "tests/cuda"), 300),
    _sanitized("memcheck"),
    _sanitized("racecheck"),
    # How fast the tensor cores are, and what the planner could have chosen better.
    *_program("mma_rates", 30, "{out}/mma_rates.json"),
    *_program("variants", 240, "--json", "{out}/variants.json", "--tokens", "1", "8"),
    # Which mode wins at one token, at every bits per weight, beside the peers.
    Step(
        "decode",
        _measure("decode", [1], [*OURS, *PEERS], "--bpw", "0.1", "0.3", "0.55", "1.0", "--refcheck"),
        300,
        _USABLE,
    ),
    Step(
        "batches",
        _measure("batches", [2, 4, 8, 16], [*OURS[:2], *PEERS], "--bpw", "0.1", "0.55"),
        300,
        _USABLE,
    ),
    # Eager calls: what the host adds to a launch.
    Step(
        "eager",
        _measure("eager", [1], [OURS[0], "dense"], "--bpw", "0.1", "--no-graphs", "--modes", "hot"),
        120,
        _USABLE,
    ),
)


@functools.cache
def _architecture() -> str:
    """``90-real`` on an H100 or H200; what this GPU is."""
    print_it = "import torch; print('{}{}-real'.format(*torch.cuda.get_device_capability()))"
    asked = subprocess.run([PYTHON, "-c", print_it], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "90-real"


def run_step(step: Step, out: Path, wheels: Path, done: dict[str, Result]) -> Result:
    """Run one step, unless one that it needs has not passed; its output goes to ``out/<name>.log``."""
    for name in step.needs:
        if name in done and done[name].state != "passed":
            return Result(step.name, f"skipped: {name} {done[name].state}", 0.0, "")
    log = out / f"{step.name}.log"
    environment = {
        # CUDA kernels also where the tool that builds them does not see a GPU.
        "LB2_CUDA": "on",
        "LB2_CUDA_ARCHS": _architecture(),
        # The machine is this suite's, whoever manages its Python.
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        **os.environ,
        **dict(step.variables),
    }
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                step.arguments(out, wheels),
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=step.seconds,
                check=False,
            ).returncode
            state = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            state = "timed out"
        except OSError as error:
            state = f"failed: {error}"
    return Result(step.name, state, time.monotonic() - start, str(log))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--steps", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names)
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_suite_out")))
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="folder with pybind11 and gemlite"
    )
    parser.add_argument("--dry-run", action="store_true")
    return parser


def _dry_run(steps: Sequence[Step], out: Path, wheels: Path) -> int:
    from benchmarks.__main__ import main as harness

    for step in steps:
        arguments = step.arguments(out, wheels)
        print(f"{step.name} (at most {step.seconds} s): {' '.join(arguments)}")
        if arguments[1:3] == ["-m", "benchmarks"]:
            with tempfile.TemporaryDirectory() as folder:
                status = harness([*arguments[3:], *SMALL, "--json", f"{folder}/rows.json"])
            if status != 0:
                return status
        elif shutil.which(arguments[0]) is None and not arguments[0].startswith(str(out)):
            print(f"  {arguments[0]} is not on this machine")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen steps; return 1 if one did not pass."""
    options = _parser().parse_args(arguments)
    steps = [step for step in STEPS if step.name in options.steps]
    out, wheels = options.out.resolve(), options.wheels.resolve()
    if options.dry_run:
        return _dry_run(steps, out, wheels)
    out.mkdir(parents=True, exist_ok=True)
    done: dict[str, Result] = {}
    for step in steps:
        done[step.name] = run_step(step, out, wheels, done)
        (out / "steps.json").write_text(json.dumps([asdict(result) for result in done.values()], indent=2))
    for result in done.values():
        if result.state != "passed" and result.log:
            print(f"--- end of {result.log}\n{Path(result.log).read_text('utf-8')[-1500:]}")
    for result in done.values():
        print(f"{result.name:<12} {result.seconds:7.1f} s  {result.state}")
    return int(any(result.state != "passed" for result in done.values()))


if __name__ == "__main__":
    sys.exit(main())
