"""Runs the steps of groups: what they need first, some side by side, and not again what is known."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.cuda.suite.make import sources_digest
from benchmarks.cuda.suite.steps import PASSED, Folders, Result, Step, run_step
from benchmarks.cuda.suite.summary import summary
from benchmarks.records import ROOT, host_environment, write_result, write_text

__all__ = ["Run", "batches", "earlier_results", "limit_of", "plan"]

#: A change of these makes earlier results those of another program.
_SOURCES = (
    *("csrc", "CMakeLists.txt", "benchmarks/cuda", "benchmarks/layers", "tests/cuda", "tests/triton"),
    # Without what is built into it.
    *(
        f"littlebit2_kernels/{path.name}"
        for path in sorted((ROOT / "littlebit2_kernels").iterdir())
        if path.name not in ("lib", "include", "__pycache__")
    ),
)
_MOST_LOG = 12 * 2**20


def plan(
    steps: Sequence[Step], wanted: Iterable[str], left_out: Callable[[Step], str]
) -> tuple[list[Step], list[Result]]:
    """The steps to be run, in order, and what can be said of others at once.

    Args:
        steps: all there are.
        wanted: names of those asked for.
        left_out: why a step cannot be run, or nothing.

    Returns:
        The wanted steps and those that they need, each after what it needs; results of wanted steps that this
        machine cannot run, for which nothing else is run.
    """
    by_name = {step.name: step for step in steps}
    hopeless: dict[str, str] = {}
    for step in steps:
        reason = left_out(step)
        for name in step.needs:
            reason = reason or hopeless.get(name, "")
        if reason:
            hopeless[step.name] = reason
    needed: set[str] = set()

    def add(name: str) -> None:
        if name not in needed:
            needed.add(name)
            for other in by_name[name].needs:
                add(other)

    asked = list(dict.fromkeys(wanted))
    for name in asked:
        if name not in hopeless:
            add(name)
    left = [Result(name, hopeless[name]) for name in asked if name in hopeless]
    return [step for step in steps if step.name in needed], left


def batches(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """Neighbors that run at the same time."""
    batch: list[Step] = []
    for step in steps:
        if batch and not (step.beside and step.beside == batch[-1].beside):
            yield batch
            batch = []
        batch.append(step)
    if batch:
        yield batch


def limit_of(steps: Sequence[Step]) -> int:
    """Seconds that steps take at most."""
    return sum(max(step.seconds for step in batch) for batch in batches(steps))


def _digest() -> str:
    return sources_digest(_SOURCES)


def earlier_results(files: Iterable[Path], digest: str) -> dict[str, Result]:
    """What passed in earlier calls on the same sources, by name."""
    found: dict[str, Result] = {}
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8"))
            if content["sources"] != digest or content["rehearsal"]:
                continue
            steps = [Result(**entry) for entry in content["steps"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {file} must be a JSON file of gpu-suite: {error}") from error
        found.update({step.name: replace(step, reused=True) for step in steps if step.state == PASSED})
    return found


def _measured(step: Step, folders: Folders) -> Any:
    """What a step wrote; also of one that ran out of time."""
    path = folders.work / step.result
    if not step.result or not path.is_file():
        return None
    text = path.read_text("utf-8", "replace")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
    except ValueError:
        pass  # cut off where it was ended
    return text


class Run:
    """One call: results are written after every step, so that nothing is lost where a call is ended.

    Args:
        options: of the command.
        folders: of this call.
        name: of the three files.
        stand_in: comes before every command in a rehearsal.
    """

    def __init__(
        self, options: Namespace, folders: Folders, name: str, stand_in: tuple[str, ...] = ()
    ) -> None:
        self._options, self._folders, self._name, self._stand_in = options, folders, name, stand_in
        self._sources = _digest()
        self.done: dict[str, Result] = {}
        folders.out.mkdir(parents=True, exist_ok=True)
        folders.work.mkdir(parents=True, exist_ok=True)

    def earlier(self, resumed: Sequence[Path]) -> dict[str, Result]:
        """Results of ``resumed``, and of calls before on this machine."""
        state = self._folders.work / "state"
        return earlier_results([*sorted(state.glob("*.json")), *resumed], self._sources)

    def run(
        self, steps: Sequence[Step], left: Sequence[Result], known: dict[str, Result], end: float
    ) -> None:
        """Run ``steps``, except those known, until ``end`` on the monotonic clock."""
        for result in left:
            self._keep(result)
        unknown = [step for step in steps if step.group == "setup" or step.name not in known]
        for step in steps:
            if step not in unknown:
                self._keep(known[step.name])
        if all(step.group == "setup" for step in unknown):
            unknown = []  # nothing is left that needs them
        for batch in batches(unknown):
            for step in batch:  # not of an earlier call
                if step.result:
                    (self._folders.work / step.result).unlink(missing_ok=True)
            before, seconds = dict(self.done), end - time.monotonic()
            with ThreadPoolExecutor(len(batch)) as pool:
                runs = [
                    pool.submit(run_step, step, self._folders, before, seconds, self._stand_in)
                    for step in batch
                ]
                results = [run.result() for run in runs]
            for step, result in zip(batch, results, strict=True):
                self._keep(replace(result, measured=_measured(step, self._folders)))

    def _keep(self, result: Result) -> None:
        self.done[result.name] = result
        print(f"{result.name:<18} {result.seconds:7.1f} s  {result.state}", flush=True)
        if result.bad and result.tail:
            print(f"--- end of {result.name}\n{result.tail[-1500:]}", flush=True)
        self._write()

    def _write(self) -> None:
        results, out = list(self.done.values()), self._folders.out
        about = host_environment()
        contents = {
            "sources": self._sources,
            "rehearsal": bool(self._stand_in),
            "carried": _manifest(self._folders.carry),
            "steps": [asdict(result) for result in results],
        }
        file = write_result(out / f"{self._name}.json", self._options, about, **contents)
        if not self._stand_in:
            state = self._folders.work / "state"
            state.mkdir(exist_ok=True)
            write_text(state / file.name, file.read_text("utf-8"))
        log = "\n".join(f"=== {result.name}: {result.state}\n{result.tail}" for result in results)
        write_text(out / f"{self._name}.log", log[-_MOST_LOG:] + "\n")
        about["git"] = about["git"] or (contents["carried"] or {}).get("git")
        text = summary(self._name, results, about, rehearsal=bool(self._stand_in))
        write_text(out / f"{self._name}.md", text)

    def summary(self) -> str:
        """The page that was written last."""
        return (self._folders.out / f"{self._name}.md").read_text("utf-8")


def _manifest(carry: Path) -> Any:
    try:
        return json.loads((carry / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
