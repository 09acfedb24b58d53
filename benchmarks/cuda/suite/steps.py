"""A step of the suite: a command, its time limit, what it needs, and how it is run."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.records import ROOT

__all__ = ["PASSED", "PYTHON", "Folders", "Result", "Step", "capability", "run_step"]

PYTHON = sys.executable or "python3"
PASSED = "passed"


@dataclass(frozen=True)
class Folders:
    """``out`` for what is to be kept, ``work`` for programs and logs, ``carry`` for what was brought."""

    out: Path
    work: Path
    carry: Path


@dataclass(frozen=True)
class Step:
    """One command of the suite.

    Attributes:
        name: name for ``--steps``.
        group: the group that it belongs to; ``"setup"`` is run where another step needs it.
        command: arguments; ``{out}``, ``{work}``, ``{carry}`` and ``{arch}`` are filled in.
        seconds: time limit.
        needs: steps that must have passed, which are run before.
        why: the question that it answers.
        variables: variables added to the environment.
        result: the file in ``work`` that it writes.
        beside: steps of one name that follow one another run at the same time; none of them takes times.
        tool: a program without which it is left out.
        wheel: a pattern in ``carry`` without which it is left out.
        optional: whether the suite passes although this step does not.
    """

    name: str
    group: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ("build",)
    why: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    result: str = ""
    beside: str = ""
    tool: str = ""
    wheel: str = ""
    optional: bool = False

    def arguments(self, folders: Folders, arch: str = "{arch}") -> list[str]:
        """The command with its folders and the architecture filled in."""
        arguments = list(self.command)
        for name, value in {**vars(folders), "arch": arch}.items():
            arguments = [part.replace(f"{{{name}}}", str(value)) for part in arguments]
        return arguments

    def left_out(self, folders: Folders, *, elsewhere: bool = False) -> str:
        """Why the step cannot be run on this machine, or nothing; of tools ``elsewhere`` nothing is known."""
        if self.wheel and not any(folders.carry.glob(self.wheel)):
            return f"left out: {self.wheel} was not carried along"
        if self.tool and not elsewhere and shutil.which(self.tool) is None:
            return f"left out: {self.tool} is not on this machine"
        return ""


@dataclass(frozen=True)
class Result:
    """What became of a step.

    Attributes:
        name: of the step.
        state: ``"passed"``, ``"failed with 3"``, ``"timed out"``, ``"skipped: ..."`` or ``"left out: ..."``.
        seconds: that it took.
        tail: the end of its output.
        measured: what it wrote, a parsed JSON or text.
        reused: whether it is of an earlier call.
    """

    name: str
    state: str
    seconds: float = 0.0
    tail: str = ""
    measured: object = field(default=None, repr=False)
    reused: bool = False

    @property
    def bad(self) -> bool:
        """Whether something is wrong; a step that is left out is not."""
        return self.state != PASSED and not self.state.startswith("left out")


@functools.cache
def capability() -> str:
    """Of the GPU here; ``"90"``, an H100 or H200, where there is none."""
    print_it = "import torch; print('{}{}'.format(*torch.cuda.get_device_capability()))"
    asked = subprocess.run([PYTHON, "-c", print_it], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "90"


def environment_of(step: Step, folders: Folders) -> dict[str, str]:
    """The variables that a step's command runs with: nothing is installed, everything found by path."""
    places = (str(ROOT), str(ROOT / "python"), str(folders.work / "site"), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "PYTHONUNBUFFERED": "1",
        "OUT": str(folders.out),
        **dict(step.variables),
    }


def run_step(
    step: Step,
    folders: Folders,
    done: Mapping[str, Result],
    seconds: float = math.inf,
    stand_in: tuple[str, ...] = (),
) -> Result:
    """Run one step in at most ``seconds``, unless one that it needs has not passed.

    Its output goes to ``work/<name>.log``. What it leaves running is ended. ``stand_in`` comes before the
    command in a rehearsal.
    """
    for name in step.needs:
        if name in done and done[name].state != PASSED:
            return Result(step.name, f"skipped: {name} {done[name].state}")
    if seconds < 1:
        return Result(step.name, "skipped: out of time")
    log = folders.work / f"{step.name}.log"
    arch = "90" if stand_in else capability()
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                [*stand_in, *step.arguments(folders, arch)],
                cwd=ROOT,
                env=environment_of(step, folders),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Result(step.name, f"failed: {error}")
        try:
            code = process.wait(min(step.seconds, seconds))
            state = PASSED if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            # Compilers and tests that outlive their parent would go on beside the next measurement.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(step.name, state, time.monotonic() - start, log.read_text("utf-8", "replace")[-100_000:])
