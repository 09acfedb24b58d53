"""Time what does not depend on a layer's size: tiny calls, imports, the command line, loading a checkpoint.

Each round measures in fresh processes. --against PATH measures another checkout too, in turn with this
one, and prints ratios of medians within rounds (above 1: this checkout is faster). Only public API of
both is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.options import add_json, note, positive
from benchmarks.records import ROOT, describe_environment, git_state, host_environment, write_result
from benchmarks.timing import Timing, spread_of

__all__ = ["Row", "add_arguments", "measure", "overhead_table", "run"]

PROBE = Path(__file__).with_name("overhead_probe.py")


@dataclass(frozen=True)
class Row:
    """One quantity.

    Attributes:
        name: what is timed.
        samples: seconds, one per round.
        against: the same of the other checkout, or ``None``.
    """

    name: str
    samples: list[float]
    against: list[float] | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--rounds", type=positive(int), default=5, help="default %(default)s")
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=0.2,
        help="duration of each timed call (default %(default)s)",
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="root of another checkout")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds instead of elapsed ones, for busy machines"
    )
    parser.add_argument(
        "--no-model", action="store_true", help="leave out loading a checkpoint, which needs transformers"
    )
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure and print."""
    trees = [ROOT]
    if options.against is not None:
        other = options.against.resolve()
        if not (other / "littlebit2_kernels").is_dir():
            raise ValueError(f"against must be the root of a checkout, got {options.against}")
        trees.append(other)
    about = host_environment()
    rows = measure(
        trees, options.rounds, options.seconds, model=not options.no_model, cpu_time=options.cpu_time
    )
    print(describe_environment(about))
    if options.against is not None:
        about["against"] = {"path": str(options.against), "git": git_state(trees[1])}
    print(f"\n{overhead_table(rows)}")
    if options.json is not None:
        write_result(options.json, options, about, rows=rows)
    return 0


def measure(
    trees: Sequence[Path], rounds: int, seconds: float, *, model: bool = True, cpu_time: bool = False
) -> list[Row]:
    """Measure one or two checkouts, in rotating order.

    Args:
        trees: their roots.
        rounds: samples of each quantity.
        seconds: duration of each timed call.
        model: whether to load a checkpoint too.
        cpu_time: whether to take CPU seconds instead of elapsed ones.

    Raises:
        RuntimeError: a measurement fails.
    """
    samples: list[dict[str, list[float]]] = [{} for _ in trees]
    clock = "cpu" if cpu_time else "elapsed"
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [Path(folder, str(index)) for index in range(len(trees))]
        if model:
            for tree, checkpoint in zip(trees, checkpoints, strict=True):
                _probe(tree, clock, "synthesize", str(checkpoint))
        for turn in range(rounds):
            note(f"round {turn + 1} of {rounds}")
            order = [(turn + index) % len(trees) for index in range(len(trees))]
            for probe in _probes(seconds, model=model):
                for index in order:
                    more = [str(checkpoints[index])] if probe[0] == "load" else []
                    for name, value in _probe(trees[index], clock, *probe, *more).items():
                        samples[index].setdefault(name, []).append(value)
    others = samples[1] if len(trees) > 1 else {}
    return [Row(name, values, others.get(name)) for name, values in samples[0].items()]


def _probes(seconds: float, *, model: bool) -> list[tuple[str, ...]]:
    probes = [("calls", str(seconds)), ("import", "littlebit2_kernels"), ("import", "littlebit2"), ("help",)]
    return [*probes, ("load",)] if model else probes


def _probe(tree: Path, clock: str, *arguments: str) -> dict[str, float]:
    """Run one probe on a checkout; returns seconds by name."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "python")))}
    if arguments[0] == "help":
        command = [sys.executable, "-m", "littlebit2", "--help"]
    else:
        # -P: the folder of the script must not hide modules of the checkout.
        command = [sys.executable, "-P", str(PROBE), clock, *arguments]
    start, cpu_start = time.perf_counter(), _children_seconds()
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - start if clock == "elapsed" else _children_seconds() - cpu_start
    if done.returncode != 0:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "")
        raise RuntimeError(f"{' '.join(arguments)} failed on {tree}: {last}")
    if arguments[0] == "help":
        return {"littlebit2 --help": elapsed}
    found = json.loads(done.stdout.splitlines()[-1])
    if Path(found["root"]).resolve() != tree.resolve():
        raise RuntimeError(f"littlebit2_kernels must be imported from {tree}, got {found['root']}")
    return found["seconds"]


def _children_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def overhead_table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; calls also as calls per second."""
    compared = any(row.against is not None for row in rows)
    head = ["", "time (quartiles)", "calls/s", *(["other", "ratio (quartiles)"] if compared else [])]
    lines = []
    for row in rows:
        spread = spread_of(row.samples)
        line = [row.name, _seconds(spread.median, spread.low, spread.high)]
        line.append(f"{1 / spread.median:.0f}" if row.name.startswith("call: ") else "")
        if compared:
            if row.against is None:
                line += ["", ""]
            else:
                other = spread_of(row.against)
                ratio = Timing(tuple(row.samples)).speedup_spread(Timing(tuple(row.against)))
                line.append(_seconds(other.median, other.low, other.high))
                line.append(f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})")
        lines.append(line)
    return markdown(head, lines)


def _seconds(median: float, low: float, high: float) -> str:
    scale, unit = next(
        (s, u) for s, u in ((1, "s"), (1e3, "ms"), (1e6, "us")) if median * s >= 1 or u == "us"
    )
    return f"{median * scale:.2f} {unit} ({low * scale:.2f}-{high * scale:.2f})"
