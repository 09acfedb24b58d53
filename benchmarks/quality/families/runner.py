"""The sweep: every model type in a process of its own, with limits, results kept as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

# Loaded before the processes are forked, so that each need not load them again.
from littlebit2.integrations import loading, rehearsal, trial  # noqa: F401
from littlebit2.offline import pipeline  # noqa: F401

from .classes import classes_of, model_types
from .trial import FAILED, NOT_BUILT, WORKS, Outcome, OutOfTime, try_type

__all__ = ["SECONDS", "read_results", "sweep", "try_apart"]

#: CPU seconds that a model type may take.
SECONDS = 60
#: Bytes of private memory that it may take.
MEMORY = 8 << 30
#: Wall time allowed for each CPU second, on a machine that does other things too.
_PATIENCE = 10


def try_apart(model_type: str, *, seconds: int = SECONDS) -> Outcome:
    """Try the class of a model type in a forked process that may take ``seconds`` of CPU time.

    Each takes about a second less after :func:`warm_up`.
    """
    names = classes_of(model_type)
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(names, model_type, folder, sender, seconds), daemon=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads; the child uses one
            process.start()
        sender.close()
        return _listen(receiver, Outcome(names[0], model_type, NOT_BUILT), process, seconds)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
        receiver.close()
        shutil.rmtree(folder, ignore_errors=True)


def warm_up() -> None:
    """Try one model here, so that what is loaded and compiled at first use is there in every fork."""
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        try_type("llama", ["LlamaForCausalLM"], folder, lambda _: None)
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        shutil.rmtree(folder, ignore_errors=True)


def _listen(receiver: Connection, outcome: Outcome, process: Any, seconds: int) -> Outcome:
    """Return what the process says, or what its end means."""
    doing, end = "start", time.monotonic() + _PATIENCE * seconds
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            message = receiver.recv()
            if isinstance(message, Outcome):
                return message
            doing = message
        return replace(outcome, reason=f"no answer after {_PATIENCE * seconds} s of wall time in: {doing}")
    except EOFError:
        process.join()
    code = process.exitcode
    if code == -signal.SIGKILL:
        return replace(outcome, reason=f"took more than {seconds} s of CPU time in: {doing}", seconds=seconds)
    ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return replace(outcome, kind=FAILED, reason=f"the process ended with {ended} in: {doing}")


def _run(names: Sequence[str], model_type: str, folder: Path, sender: Connection, seconds: int) -> None:
    """What the forked process does."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    signal.signal(signal.SIGXCPU, _out_of_time)
    used = int(time.process_time())
    # The hard limit ends native code that does not come back to Python.
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    started, doing = time.process_time(), ""

    def step(what: str) -> None:
        nonlocal doing
        doing = what
        sender.send(what)

    try:
        outcome = try_type(model_type, names, folder, step)
    except OutOfTime:
        late = f"took more than {seconds} s of CPU time in: {doing}"
        outcome = Outcome(names[0], model_type, NOT_BUILT, late)
    outcome.seconds = round(time.process_time() - started, 2)
    sender.send(outcome)


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


def sweep(
    names: Sequence[str],
    results: Path,
    *,
    resume: bool = False,
    retry: bool = False,
    every: int = 1,
    seconds: int = SECONDS,
    commit: str = "",
    show: Callable[[str], Any] = sys.stdout.write,
) -> list[Outcome]:
    """Try model types, and keep each result in a file of JSON lines as soon as it is known.

    Args:
        names: model types; all if empty.
        results: the file.
        resume: whether to keep the file's results instead of beginning anew.
        retry: whether to try again what the file says does not work, or was not compared.
        every: try only each ``every``-th type.
        seconds: CPU time for each.
        commit: stored with every result.
        show: gets a line for every result.

    Returns:
        All results of the file, of the types as they are ordered in the library.
    """
    wanted = [t for t in model_types() if not names or t in names][::every]
    warm_up()
    known = read_results(results) if resume and results.exists() else {}
    if not resume:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text("", "utf-8")
    for model_type in wanted:
        before = known.get(model_type)
        if before is not None and not (retry and not (before.kind == WORKS and before.compared)):
            continue
        outcome = replace(try_apart(model_type, seconds=seconds), commit=commit)
        known[model_type] = outcome
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        detail = outcome.reason or ("" if outcome.compared else f"not compared: {outcome.not_compared}")
        show(f"{outcome.kind:9} {outcome.seconds:5.1f} {model_type:28} {outcome.model:44} {detail}\n")
        sys.stdout.flush()
    return [known[t] for t in model_types() if t in known]


def read_results(path: Path) -> dict[str, Outcome]:
    """Return what a file of :func:`sweep` holds, the latest result of every model type."""
    found: dict[str, Outcome] = {}
    for line in _lines(path):
        outcome = Outcome(**line)
        found[outcome.model_type] = outcome
    return found


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last one, of a sweep that was interrupted
            continue
