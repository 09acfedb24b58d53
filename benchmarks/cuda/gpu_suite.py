"""On a GPU machine without a network: build, test and measure, by groups in the order of what matters.

    python3 benchmarks/gpu_suite.py prepare     before, without a GPU: what is carried along
    python3 benchmarks/gpu_suite.py --plan      what will run, and for how long at most
    python3 benchmarks/gpu_suite.py first       the first ten minutes
    python3 benchmarks/gpu_suite.py decode      and so on, a group a call

Nothing is installed. Every step is a command with a time limit of its own; a step that fails stops only those
that need it. A call ends within ten minutes and leaves three files in --out: GROUP.md (one page), GROUP.json
(every result) and GROUP.log (all output). A group that was cut off goes on where it was when it is called
again: on the same machine, or with --resume GROUP.json on another. --rehearse goes through all of it with
stand-ins for the commands, on any machine, within seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.cuda.suite.groups import CALL_SECONDS, GROUPS, STEPS
from benchmarks.cuda.suite.make import prepare
from benchmarks.cuda.suite.running import Run, limit_of, plan
from benchmarks.cuda.suite.steps import PYTHON, Folders, Step
from benchmarks.options import positive
from benchmarks.records import ROOT, write_text

__all__ = ["add_arguments", "run"]

_STAND_IN = (PYTHON, "-m", "benchmarks.cuda.suite.stand_in")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    names = [step.name for step in STEPS]
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="prepare, or " + ", ".join(GROUPS))
    parser.add_argument(
        "--steps", nargs="+", choices=names, metavar="STEP", help="in place of groups: " + ", ".join(names)
    )
    parser.add_argument("--plan", action="store_true", help="print what would run (without groups: all)")
    parser.add_argument("--rehearse", action="store_true", help="run stand-ins in place of the commands")
    parser.add_argument(
        "--seconds", type=positive(float), default=CALL_SECONDS, help="of all steps (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_suite_out")))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_suite", help="logs and programs")
    parser.add_argument(
        "--carry",
        type=Path,
        default=ROOT / "build" / "carry",
        help="what `prepare` makes",
    )
    parser.add_argument("--arch", default="90", help="GPU architecture of `prepare` (default %(default)s)")
    parser.add_argument("--resume", nargs="+", type=Path, default=[], metavar="JSON", help="earlier results")
    parser.add_argument("--again", action="store_true", help="run steps that have passed before, too")
    parser.add_argument(
        "--extract", type=Path, metavar="JSON", help="write each measurement in it as a file to --out"
    )


def _wanted(options: Namespace) -> list[str]:
    for group in options.groups:
        if group not in GROUPS:
            raise ValueError(f"GROUP must be prepare or one of {', '.join(GROUPS)}, got {group!r}")
    if options.steps:
        return list(options.steps)
    return [step.name for step in STEPS if step.group in options.groups]


def _print_plan(groups: list[str], folders: Folders) -> None:
    so_far = 0
    for group in groups:
        names = [step.name for step in STEPS if step.group == group]
        steps, left = plan(STEPS, names, lambda step: step.left_out(folders, elsewhere=True))
        so_far += limit_of(steps)
        print(f"{group}: at most {limit_of(steps)} s, {so_far} s with those before")
        for step in steps:
            print(f"  {step.name:<18} {step.seconds:4d} s  {_remark(step)}")
        for result in left:
            print(f"  {result.name:<18}    -    {result.state}")
        print(f"  command: python3 benchmarks/gpu_suite.py {group}")
    carried = [path for path in folders.carry.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in carried) / 2**20
    print(f"carried along: {len(carried)} files, {size:.1f} MiB in {folders.carry}")
    if not (folders.carry / "manifest.json").is_file():
        print("  nothing is prepared: `gpu_suite.py prepare` saves the time that `build` takes otherwise")


def _remark(step: Step) -> str:
    notes = [f"beside others: {step.beside}"] if step.beside else []
    notes += [f"where {step.tool} is"] if step.tool else []
    return f"{step.why}{' (' if notes else ''}{'; '.join(notes)}{')' if notes else ''}"


def _extract(file: Path, out: Path) -> int:
    try:
        steps = json.loads(file.read_text("utf-8"))["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--extract: {file} must be a JSON file of gpu-suite: {error}") from error
    for step in steps:
        measured = step["measured"]
        if measured is not None:
            text = measured if isinstance(measured, str) else json.dumps(measured, indent=1) + "\n"
            suffix = "txt" if isinstance(measured, str) else "json"
            print(write_text(out / f"{step['name']}.{suffix}", text))
    return 0


def run(options: Namespace) -> int:
    """Run the groups; returns 1 if a step did not pass."""
    if options.extract is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        return _extract(options.extract, options.out)
    if options.groups == ["prepare"]:
        return prepare(options.carry.resolve(), options.arch)
    wanted = _wanted(options)
    folders = Folders(options.out.resolve(), options.work.resolve(), options.carry.resolve())
    if options.plan or not wanted:
        _print_plan(list(options.groups or GROUPS), folders)
        return 0
    name = "-".join(("steps", *options.steps) if options.steps else options.groups)[:100]
    if not options.rehearse:
        return _run(options, folders, name, wanted, ())
    with tempfile.TemporaryDirectory() as work:
        return _run(options, Folders(folders.out, Path(work), folders.carry), name, wanted, _STAND_IN)


def _run(
    options: Namespace, folders: Folders, name: str, wanted: list[str], stand_in: tuple[str, ...]
) -> int:
    end = time.monotonic() + options.seconds
    this = Run(options, folders, name, stand_in)
    # In a rehearsal everything is there.
    steps, left = plan(STEPS, wanted, lambda step: "" if stand_in else step.left_out(folders))
    known = {} if options.again else this.earlier(options.resume)
    this.run(steps, left, known, end)
    print("\n" + this.summary())
    optional = {step.name for step in STEPS if step.optional}
    return int(any(result.bad and result.name not in optional for result in this.done.values()))
