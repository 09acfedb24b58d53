"""Time how interpreters start with and without the hook that makes transformers know our checkpoints.

Two virtual environments are made, and the files that an installation puts into site-packages are copied into
one of them. Their interpreters are started in turn. Programs that use neither torch nor transformers pay
no more than the difference. The fastest start of each kind is taken.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
import venv
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.options import add_json, positive
from benchmarks.records import ROOT, describe_environment, host_environment, write_result

__all__ = ["add_arguments", "measure", "run", "startup_table"]

#: The files of the hook, in ``python``.
HOOK = ("_littlebit2_autoregister.py", "littlebit2_autoregister.pth")
#: What is started: nothing, and a program that imports much of the standard library.
PROGRAMS = {"nothing": "pass", "150 modules": "import asyncio, email.mime.text, http.server, json, unittest"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--starts", type=positive(int), default=300, help="of each kind, default %(default)s")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure and print."""
    about = host_environment()
    found = {name: measure(code, options.starts) for name, code in PROGRAMS.items()}
    print(describe_environment(about))
    print(f"\n{startup_table(found)}")
    if options.json is not None:
        write_result(options.json, options, about, fastest=found)
    return 0


def startup_table(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Return what :func:`measure` found for each program as a table."""
    rows = [
        (program, clock, f"{1e3 * without:.2f}", f"{1e3 * hook:.2f}", f"{1e3 * (hook - without):+.2f}")
        for program, clocks in found.items()
        for clock, (without, hook) in clocks.items()
    ]
    return markdown(("program", "clock", "without, ms", "with, ms", "difference, ms"), rows)


def measure(code: str, starts: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of the fastest start without the hook and with it, for ``elapsed`` and ``CPU`` time.

    Args:
        code: the program.
        starts: how often each of the two is started.

    Raises:
        subprocess.CalledProcessError: the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        pythons = [_environment(Path(folder, "without")), _environment(Path(folder, "with"))]
        packages = next(Path(folder, "with").glob("lib/python*/site-packages"))
        for name in HOOK:
            shutil.copy(ROOT / "python" / name, packages)
        samples: tuple[list[tuple[float, float]], ...] = ([], [])
        for turn in range(-2, starts):  # the first starts compile the module and warm the files
            for index in (0, 1) if turn % 2 else (1, 0):
                sample = _start([str(pythons[index]), "-c", code])
                if turn >= 0:
                    samples[index].append(sample)

    # Other work on the machine only adds to a start.
    def fastest(clock: int) -> tuple[float, float]:
        without, with_hook = (min(sample[clock] for sample in taken) for taken in samples)
        return without, with_hook

    return {"elapsed": fastest(0), "CPU": fastest(1)}


def _environment(folder: Path) -> Path:
    venv.create(folder, symlinks=True)
    return folder / "bin/python"


def _start(command: Sequence[str]) -> tuple[float, float]:
    """Elapsed and CPU seconds of a process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LB2_"))}
    start, cpu_start = time.perf_counter(), _children_seconds()
    subprocess.run(command, check=True, env=inherited)
    return time.perf_counter() - start, _children_seconds() - cpu_start


def _children_seconds() -> float:
    # os.times counts in steps of 10 ms.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
