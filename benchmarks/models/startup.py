"""Time how interpreters start with and without the hook that makes transformers know our checkpoints.

Two virtual environments are made, and the files that an installation puts into site-packages are copied into
one of them. Their interpreters are started in turn. Programs that use neither torch nor transformers pay
no more than the difference.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.options import add_json, positive
from benchmarks.records import ROOT, describe_environment, host_environment, write_result

__all__ = ["add_arguments", "measure", "run"]

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
    rows = [
        (
            name,
            *(f"{1e3 * value:.2f}" for value in (without, with_hook)),
            f"{1e3 * (with_hook - without):+.2f}",
        )
        for name, (without, with_hook) in found.items()
    ]
    print(f"\n{markdown(('program', 'without, ms', 'with, ms', 'difference, ms'), rows)}")
    if options.json is not None:
        write_result(options.json, options, about, medians=found)
    return 0


def measure(code: str, starts: int) -> tuple[float, float]:
    """Return the median seconds of a start without the hook, and with it.

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
        samples: list[list[float]] = [[], []]
        for turn in range(-2, starts):  # the first starts compile the module and warm the files
            for index in (0, 1) if turn % 2 else (1, 0):
                seconds = _start([str(pythons[index]), "-c", code])
                if turn >= 0:
                    samples[index].append(seconds)
    return statistics.median(samples[0]), statistics.median(samples[1])


def _environment(folder: Path) -> Path:
    venv.create(folder, symlinks=True)
    return folder / "bin/python"


def _start(command: Sequence[str]) -> float:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LB2_"))}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=inherited)
    return time.perf_counter() - start
