"""What the checks of servers share: the clock, processes, and a count of what passed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Steps", "environment", "run_json", "stop"]

HERE = Path(__file__).resolve().parent


def environment(work: Path) -> dict[str, str]:
    """The environment of every process: offline, one thread, caches of this run alone."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {
        **own,
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


class Steps:
    """Counts checks; a failed one does not keep the others from running.

    Args:
        work: folder of this run.
        seconds: after which nothing new is started, and what runs is stopped.
    """

    def __init__(self, work: Path, seconds: float) -> None:
        self.work = work
        self.deadline = time.monotonic() + seconds
        self.passed = 0
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one check; an exception in it is its failure."""
        began = time.monotonic()
        try:
            if self.left <= 0:
                raise TimeoutError("no time left to run it")
            yield
        except Exception as error:  # whatever it is, the others are to run
            self.failed.append(name)
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
        else:
            self.passed += 1
            print(f"passed  {name} ({time.monotonic() - began:.0f} s)", flush=True)

    def close(self) -> int:
        """Print the count and return the exit status."""
        print(f"{self.passed} passed, {len(self.failed)} failed", flush=True)
        return 1 if self.failed or not self.passed else 0


def run_json(
    steps: Steps,
    script: str,
    jobs: Sequence[dict[str, Any]],
    log: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """Run ``script`` of this folder on jobs, each with a file ``out``, and ``more`` environment variables.

    Raises:
        RuntimeError: it failed, or took until the deadline; with the end of its output.
    """
    path = steps.work / f"{log}.json"
    path.write_text(json.dumps(list(jobs)))
    output = steps.work / f"{log}.log"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), str(path)],
            stdout=file,
            stderr=subprocess.STDOUT,
            # In one process, the next model needs no new one; the server's checks run it as it is.
            env={**environment(steps.work), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(more or {})},
            cwd=steps.work,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=max(1.0, steps.left))
        except subprocess.TimeoutExpired:
            status = "the time limit"
        finally:
            stop(process)
    if status != 0:
        end = "\n".join(output.read_text().splitlines()[-30:])
        raise RuntimeError(f"{script} ended with {status}:\n{end}")


def stop(process: subprocess.Popen[Any], grace: float = 20.0) -> None:
    """End a process and all that it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
        if process.poll() is not None and number == signal.SIGTERM:
            # Workers of the server may outlive it by a moment.
            time.sleep(0.5)
